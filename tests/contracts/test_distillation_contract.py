"""What this project relies on of `DistillationTrainer`'s private parts. No test here runs our code."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DistillationConfig, DistillationTrainer

from tests.support.tiny import tokenizer


CONFIG = LlamaConfig(
    vocab_size=99, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)


class Noted(DistillationTrainer):
    """Notes which private methods are called, with what."""

    def __init__(self, *args, **kwargs):
        self.noted = []
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts):
        self.noted.append(("prompts", prompts))
        return prompts, None, {}

    def _generate_and_score_completions(self, inputs):
        self.noted.append(("complete", inputs))
        self.generated = self._generate([row["prompt"] for row in inputs])
        numbers = torch.tensor([row["number"] for row in inputs])
        return {"numbers": numbers, "num_items_in_batch": torch.tensor(10.0)}

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        self.noted.append(("loss", (inputs["numbers"].tolist(), float(num_items_in_batch))))
        loss = unwrapped_student(torch.tensor([[1, 2]])).logits.sum() * 0
        return loss, torch.tensor(6.0), torch.tensor(4)


@pytest.fixture
def trainer(tmp_path):
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    args = DistillationConfig(tmp_path, max_completion_length=3, logging_steps=1, **settings, **quiet)
    rows = Dataset.from_list([{"prompt": [4, 5, 6 + i], "number": i} for i in range(4)])
    student, teacher = (LlamaForCausalLM(CONFIG) for _ in "ab")
    return Noted(student, teacher, args, train_dataset=rows, processing_class=tokenizer())


def losses(trainer):
    return [given for what, given in trainer.noted if what == "loss"]


def test_trl_completes_a_whole_step_at_once_and_cuts_it_into_parts(trainer):
    trainer.train()
    assert [what for what, _ in trainer.noted] == ["complete", "prompts", "loss", "loss"]
    assert sorted(row["number"] for row in trainer.noted[0][1]) == [0, 1, 2, 3]
    parts = [numbers for numbers, _ in losses(trainer)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(sum(parts, [])) == [0, 1, 2, 3]


def test_trl_hands_on_the_number_of_trained_tokens_and_logs_the_mean_entropy(trainer):
    trainer.train()
    assert [items for _, items in losses(trainer)] == [10.0, 10.0]
    assert trainer.state.log_history[0]["entropy"] == 1.5


def test_trl_generates_from_the_tokens_of_prompts_and_returns_answers_second(trainer):
    trainer.train()
    prompts, answers = trainer.generated[:2]
    assert sorted(prompts) == [[4, 5, 6], [4, 5, 7], [4, 5, 8], [4, 5, 9]]
    assert all(1 <= len(answer) <= 3 and all(isinstance(i, int) for i in answer) for answer in answers)
