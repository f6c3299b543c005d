"""What this project relies on of TRL's and `Trainer`'s private parts. No test here runs our code."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer

from tests.support.tiny import tokenizer


CONFIG = LlamaConfig(
    vocab_size=99, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
ROWS = [{"input_ids": [5, 6, 7, 8 + i], "labels": [-100, 6, 7, 8 + i], "domain": "a"} for i in range(4)]


class Noted(SFTTrainer):
    """Notes which private methods are called, with what."""

    noted = ()

    def note(self, name, what=None):
        self.noted = [*self.noted, (name, what)]

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        self.note("prepare", dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "domain" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "domain"]

    def _get_train_sampler(self, train_dataset=None):
        self.note("sampler")
        return SequentialSampler(self.train_dataset)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        folders = sorted(p.name for p in Path(output_dir).parent.glob("checkpoint-*"))
        self.note("save", (folders, (Path(output_dir) / TRAINER_STATE_NAME).exists()))


@pytest.fixture
def trainer(tmp_path):
    settings = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "per_device_train_batch_size": 2}
    args = SFTConfig(tmp_path, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **settings)
    data = Dataset.from_list(ROWS)
    return Noted(LlamaForCausalLM(CONFIG), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def test_trl_calls_prepare_dataset_for_training_and_evaluation_and_keeps_rows_that_are_prepared(trainer):
    assert [what for name, what in trainer.noted if name == "prepare"] == ["train", "eval"]
    assert trainer.train_dataset[0]["labels"] == ROWS[0]["labels"]
    assert "domain" in trainer.train_dataset.column_names


def test_trl_fills_in_signature_columns_only_where_they_are_none(trainer):
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "domain"} <= set(trainer._signature_columns)
    trainer._signature_columns = ["input_ids"]
    SFTTrainer._set_signature_columns_if_needed(trainer)
    assert trainer._signature_columns == ["input_ids"]


def test_trainer_drops_the_columns_that_signature_columns_does_not_name(trainer):
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    rows = trainer.train_dataset.add_column("more", [0] * 4)
    assert "more" not in trainer._remove_unused_columns(rows, description="training").column_names
    assert "domain" in trainer._remove_unused_columns(rows, description="training").column_names


def test_trainer_draws_with_get_train_sampler(trainer):
    trainer.data_collator = lambda rows: {"input_ids": [row["input_ids"][-1] for row in rows]}
    drawn = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    assert ("sampler", None) in trainer.noted
    assert drawn == [[8, 9], [10, 11]]


def test_trainer_saves_random_states_before_its_own_state_and_before_old_checkpoints_are_deleted(trainer):
    trainer.data_collator = _without_domain(trainer.data_collator)
    trainer.train()
    saved = [what for name, what in trainer.noted if name == "save"]
    assert saved == [(["checkpoint-1"], False), (["checkpoint-1", "checkpoint-2"], False)]
    assert [p.name for p in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]


def _without_domain(collator):
    return lambda rows: collator([{k: v for k, v in row.items() if k != "domain"} for row in rows])


def test_trainer_looks_for_the_state_of_a_callback_by_its_class_name_and_wants_it_there(trainer):
    class Counting(TrainerCallback, ExportableState):
        def __init__(self):
            self.count = 0

        def state(self):
            return {"args": {}, "attributes": {"count": self.count}}

    trainer.add_callback(Counting())
    trainer.state.stateful_callbacks["Counting"] = {"args": {}, "attributes": {"count": 3}}
    trainer.args.restore_callback_states_from_checkpoint = True
    trainer._load_callback_state()
    assert [c.count for c in trainer.callback_handler.callbacks if isinstance(c, Counting)] == [3]


def test_trainer_keeps_the_model_as_it_is_prepared_as_model_wrapped_and_trains_within_is_in_train(trainer):
    assert trainer.model_wrapped is trainer.model
    assert trainer.is_in_train is False


def test_prepare_inputs_leaves_tensors_on_a_processor_as_they_are(trainer):
    batch = {"input_ids": torch.tensor([[1, 2]])}
    assert trainer._prepare_inputs(batch)["input_ids"].tolist() == [[1, 2]]


def test_trl_asks_forward_for_a_fused_head_and_reads_four_fields_of_its_output(trainer):
    mask = torch.tensor([[False, True, True]])
    fields = {
        "log_probs": torch.tensor([[0.0, -1.0, -2.0]]),
        "entropy": torch.tensor([[0.0, 0.5, 1.5]]),
        "is_top1": torch.tensor([[False, True, False]]),
        "label_mask": mask,
    }
    asked = []

    def forward(**inputs):
        asked.append(inputs)
        return ModelOutput(**fields)

    trainer.model.train()
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4)}
    assert trainer.compute_loss(forward, {**inputs, "labels": inputs["input_ids"]}) == 1.5
    assert trainer.compute_loss(forward, dict(inputs), num_items_in_batch=torch.tensor(6)) == 0.5
    assert all(inputs["fused_lm_head"] is True and inputs["use_cache"] is False for inputs in asked)
    metrics = trainer._metrics["train"]
    assert metrics["entropy"] == [1.0, 1.0]
    assert metrics["mean_token_accuracy"] == [0.5, 0.5]


def test_trl_puts_the_fused_head_on_forward_and_its_output_has_those_fields(trainer):
    ids = torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[-100, 2, -100, 4]])
    output = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False)
    logits = trainer.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0] * output.label_mask
    assert output.label_mask.tolist() == [[True, False, True]]
    torch.testing.assert_close(output.log_probs, expected)
    assert output.entropy.shape == output.is_top1.shape == (1, 3)


def test_trl_logs_the_means_of_what_it_has_gathered_and_clears_it(trainer):
    trainer.model.train()
    trainer._metrics["train"].update({"entropy": [1.0, 3.0], "mean_token_accuracy": [0.5]})
    trainer._metrics["train"].pop("mean_token_accuracy", None)
    logs = {}
    trainer.log(logs)
    assert logs["entropy"] == 2.0
    assert "mean_token_accuracy" not in logs
    assert not trainer._metrics["train"]


def test_settings_named_in_valid_dict_fields_are_parsed_as_json(tmp_path):
    class Settings(SFTConfig):
        _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["run_name"]

    assert "dataset_kwargs" in SFTConfig._VALID_DICT_FIELDS
    args = Settings(tmp_path, use_cpu=True, bf16=False, report_to=[], run_name='{"a": 1}')
    assert args.run_name == {"a": 1}
