"""What a stage refuses: nothing goes wrong in silence."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812
from trl import SFTConfig

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.stage_run import data as sums
from tests.support.stages import BOTH, domains, trainer
from tests.support.tiny import specialist, tokenizer
from trainers import GateTrainer, JointTrainer
from trainers.forward_hooks import own_log_probs
from trainers.heads.head_base import TokenScores
from trainers.prompt_views import ViewCollator


# ---- what is refused


def test_a_stage_does_not_resume_from_another(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match="stage is 'gate' in .*checkpoint-3' and 'joint' here. Start a new run from"):
        trainer(JointTrainer, fused, tmp_path / "two").train(str(tmp_path / "checkpoint-3"))


def test_a_stage_does_not_resume_with_other_data(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=3).train()
    stage = trainer(GateTrainer, fused, tmp_path, domains({"text": 7, "code": 6, "math": 9}))
    with pytest.raises(ValueError, match="sizes is \\[6, 9, 8\\] in .* and \\[6, 9, 7\\] here"):
        stage.train(str(tmp_path / "checkpoint-3"))


def test_a_stage_does_not_resume_from_another_trainers_checkpoint(fused, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="has no ultrafuser_stage.json: it is another trainer's, or was cut off"):
        trainer(GateTrainer, fused, tmp_path).train(str(tmp_path / "checkpoint-3"))


def test_a_stage_does_not_resume_from_a_model_alone(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path, save_strategy="steps", save_steps=3, save_only_model=True).train()
    for checkpoint in (str(tmp_path / "checkpoint-3"), True):
        with pytest.raises(ValueError, match="holds the model alone, as `save_only_model=True` asks for. Start"):
            trainer(GateTrainer, fused, tmp_path, save_only_model=True).train(checkpoint)


@BOTH
def test_another_trainers_settings_are_refused(stage, fused, tmp_path):
    with pytest.raises(ValueError, match=f"reads its settings from a {stage.config_class.__name__}, but got a SFTCo"):
        stage(fused, SFTConfig(str(tmp_path), use_cpu=True, bf16=False), domains({"text": 8}))


def test_batches_that_do_not_divide_a_step_are_refused(fused, tmp_path):
    with pytest.raises(ValueError, match="6 examples, but per_device_train_batch_size=4 .* Choose a divisor of 6"):
        trainer(GateTrainer, fused, tmp_path, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="follows from `examples_per_domain` and is 2 here, but it was set to 5"):
        trainer(GateTrainer, fused, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=5)


def test_a_domain_that_masking_leaves_empty_is_named(fused, tmp_path):
    pairs = [{"prompt": f"{i}+{i}?", "completion": f"It is {2 * i}."} for i in range(6)]
    long = [{"prompt": pair["prompt"] * 20, "completion": pair["completion"]} for pair in pairs]
    data = {name: Dataset.from_list(rows) for name, rows in {"text": pairs, "code": long, "math": pairs}.items()}
    with pytest.raises(ValueError, match="nothing is left of \\['code'\\] once prompts are masked"):
        trainer(GateTrainer, fused, tmp_path, data, max_length=32)


def test_a_domain_whose_batches_hold_no_label_stops_the_run(fused, tmp_path):
    stage = trainer(GateTrainer, fused, tmp_path, sums({"text": 9, "code": 7, "math": 12}))
    inner = stage.data_collator.collator
    masked = {tuple(row["input_ids"]) for row in stage.train_dataset if row["domain"] == "code"}

    def collate(rows):
        batch = inner(rows)
        batch["labels"][[tuple(row["input_ids"]) in masked for row in rows]] = -100
        return batch

    stage.data_collator.collator = collate
    with pytest.raises(ValueError, match=r"since the last log \['code'\] held none: all its labels are -100"):
        stage.train()


# ---- nothing goes wrong in silence


@pytest.mark.grid
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate_domain": 1.0, "label_smoothing_factor": 0.1}, "\\['gate_domain'\\] are added to TRL's own loss"),
        ({"mix_importance": True, "loss_type": "dft"}, "loss_type='dft'"),
        ({"auto_find_batch_size": True}, "draws are counted in batches"),
        ({"mix_reward": "similarity", "packing": True}, "scores examples one by one"),
        ({"mix_reward": "loss", "mix_floor": 0.6}, "A floor is a share of the mix"),
        ({"mix_reward": "gradient", "mix_probe": 1}, "two halves of the pool"),
        ({"mix_reward": "regret", "mix_policy": "aioli"}, "follows losses as they are"),
        ({"mix_shadow": True}, "`mix_reward` is None"),
        ({"mix": "even"}, "`mix` must be one of .*'proportional'.*'even'"),
        ({"sampler": "any"}, "`sampler` must be one of .*'stratified'.*'any'"),
        ({"mix": "fixed", "mix_weights": {"poetry": 1}}, "the domains are \\['code', 'math', 'text'\\]"),
        ({"mix": "balanced", "mix_weights": {"poetry": 1}}, "names \\['poetry'\\], but the domains are"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_would_be_ignored_or_fail_later_are_refused(settings, sentence, fused, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        trainer(GateTrainer, fused, tmp_path, **settings)


def test_a_resume_with_nothing_to_resume_from_is_refused(fused, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    stage = trainer(GateTrainer, fused, tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint of a stage"):
        stage.train(resume_from_checkpoint=True)


@BOTH
def test_a_model_with_adapters_already_is_refused(stage, fused, tmp_path):
    adapted = get_peft_model(fused, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it adds adapters itself"):
        trainer(stage, adapted, tmp_path)


def test_a_stream_of_data_is_refused(fused, tmp_path):
    with pytest.raises(ValueError, match="got an IterableDataset"):
        trainer(GateTrainer, fused, tmp_path, {"text": Dataset.from_list(conversations()).to_iterable_dataset()})


def test_each_domain_may_come_in_a_format_of_its_own(fused, tmp_path):
    pairs = [{"prompt": f"{i}+{i}?", "completion": f" {2 * i}", "domain": "another"} for i in range(6)]
    data = {"text": Dataset.from_list(conversations(6)), "code": Dataset.from_list(pairs)}
    stage = trainer(GateTrainer, fused, tmp_path, data, examples_per_domain=3)
    stage.train()
    rows = {name: [r for r in stage.train_dataset if r["domain"] == name] for name in data}
    assert all(len(part) == 6 for part in rows.values())
    # of a completion only that is learned; of a conversation, here, everything
    assert all(-100 in row["labels"] for row in rows["code"])
    assert not any(-100 in row["labels"] for row in rows["text"])


def test_a_second_training_begins_anew(fused, tmp_path):
    settings = {"mix_reward": "loss", "mix_every": 1, "mix_delay": 1, "max_steps": 2, "learning_rate": 0.0}
    stage = trainer(GateTrainer, fused, tmp_path, **settings)
    stage.train()
    first = stage.controller.mixes
    stage.train()
    assert stage.controller.mixes == first
    assert len(first) == 3


def test_regret_reads_a_specialist_as_it_speaks_under_a_soft_cap_of_its_own(tmp_path):
    pair = {n: specialist("gemma2", layers=k, final_logit_softcapping=2.0 + k) for k, n in ((1, "text"), (2, "code"))}
    model = UltraFuserForCausalLM.from_specialists(pair, fusion="probabilities")
    stage = trainer(GateTrainer, model, tmp_path, domains({"text": 4, "code": 4}), examples_per_domain=3)
    batch = stage.data_collator([stage.train_dataset[i] for i in range(8)])
    states = [
        s(batch["input_ids"], batch["attention_mask"]).last_hidden_state for s in model.model.specialists.values()
    ]
    domain, labels = batch["domain"][:, 1:], batch["labels"]
    seen = {"hidden_states": states, "scores": TokenScores(label_mask=labels[:, 1:] != -100)}
    found = own_log_probs(stage, seen, labels, domain)
    for row in range(8):
        own = pair[stage.domains[domain[row, 0]]]
        logits = own(batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1]).logits
        expected = -F.cross_entropy(logits[0, :-1], labels[row, 1:], reduction="none")
        assert torch.allclose(found[row], expected, atol=1e-5)


@BOTH
def test_every_specialist_may_read_the_prompt_in_its_own_template(stage, fused, tmp_path):
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    templates = {"text": CHAT_TEMPLATE, "code": CHAT_TEMPLATE.replace("<", "[["), "math": CHAT_TEMPLATE}
    views = ViewCollator(words, templates, fused.config.specialist_names)
    unprepared = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    more = {"data_collator": views}
    run = trainer(stage, fused, tmp_path, max_steps=1, mix_reward="regret", mix_every=1, more=more, **unprepared)
    rows = [run.train_dataset[i] for i in list(run.sampler)[:6]]
    batch = views(rows)
    batch.pop("domain")
    with torch.no_grad():
        expected = fused(**batch).loss.item()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert (run.controller.rewards > 0).all()
