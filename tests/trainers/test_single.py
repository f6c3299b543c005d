"""Mixture-of-Skills on one ordinary model: rewards by hand, the draws of a fused run, resuming, and what is rejected."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, changed, weights
from tests.support.stage_run import data as sums
from tests.support.stages import batch_of, logs, trainer
from tests.support.tiny import specialist, tokenizer
from trainers import JointTrainer, SingleStageConfig, SingleTrainer
from trainers.mix.probe import Probe
from ultrafuser.cli.app import app


SIZES = {"code": 7, "math": 12, "text": 9}
LEARNED = {"mix_every": 1, "mix_delay": 1, "mix_probe": 4, "mix_policy": "rate", "mix_smoothing": 1.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return specialist("llama")


def stage_of(model, folder, cls=SingleTrainer, **settings):
    settings = {**LEARNED, "learning_rate": 0.0, "max_steps": 1, **settings}
    return trainer(cls, model, folder, sums(SIZES), **settings)


def nats(model, batch):
    """Mean loss of the supervised tokens."""
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


def pool(stage):
    """The pool's examples one by one, by domain."""
    rows = [stage.train_dataset[i] for i in stage.controller.probe.places]
    return [[stage.data_collator([row]) for row in rows if row["domain"] == name] for name in SIZES]


def test_losses_are_the_models_own_by_domain(model, tmp_path):
    twin = copy.deepcopy(model)
    stage = stage_of(model, tmp_path, mix_reward="loss")
    batch = batch_of(stage)
    stage.train()
    (entry,) = logs(stage)
    assert entry["loss"] == pytest.approx(nats(twin, {k: v for k, v in batch.items() if k != "domain"}), abs=1e-3)
    for d, name in enumerate(SIZES):
        rows = batch["domain"][:, 0] == d
        expected = nats(twin, {k: v[rows] for k, v in batch.items()})
        assert entry[f"loss/{name}"] == pytest.approx(expected, abs=1e-5)
        assert stage.controller.rewards[d] == pytest.approx(expected, abs=1e-5)
    assert not [key for key in entry if "gate" in key or "top1" in key]


@pytest.mark.parametrize("reward", ["difficulty", "similarity", "uncertainty", "gradient"])
def test_rewards_of_the_pool_are_those_by_hand(reward, model, tmp_path):
    twin = copy.deepcopy(model)
    stage = stage_of(model, tmp_path, mix_reward=reward)
    stage.train()
    found = []
    for examples in pool(stage):
        batches = [{k: b[k] for k in ("input_ids", "labels")} for b in examples]
        if reward == "difficulty":
            found.append(1.0)  # the rate is 0
        elif reward == "uncertainty":
            predicted = [twin(b["input_ids"]).logits[0, :-1].log_softmax(-1) for b in batches]
            kept = [p[b["labels"][0, 1:] != -100] for p, b in zip(predicted, batches, strict=True)]
            found.append(np.mean([-(p.exp() * p).sum(-1).mean().item() for p in kept]))
        else:
            states = [twin(b["input_ids"], output_hidden_states=True).hidden_states[-1][0].mean(0) for b in batches]
            found.append(torch.stack(states).mean(0).detach())
    if reward == "gradient":
        assert np.isfinite(stage.controller.rewards).all()
        assert len(set(stage.controller.rewards)) == 3
        return
    if reward == "similarity":
        z = F.normalize(torch.stack(found).double(), dim=-1)
        found = (z @ z.T).mean(1).tolist()
    assert stage.controller.rewards == pytest.approx(found, rel=1e-5)


def test_draws_and_mixes_are_those_of_a_fused_run_with_the_same_rewards(model, tmp_path, monkeypatch):
    fixed = np.random.default_rng(0).normal(size=(3, 5))
    monkeypatch.setattr(Probe, "mean_hidden_states", lambda probe: fixed)
    fused = UltraFuserForCausalLM.from_specialists({name: specialist("llama", layers=1) for name in SIZES})
    settings = {"mix_reward": "similarity", "max_steps": 3, "mix_policy": "logits"}
    runs = [stage_of(m, tmp_path, cls, **settings) for cls, m in ((SingleTrainer, model), (JointTrainer, fused))]
    drawn = []
    for run in runs:
        seen, collate = [], run.data_collator
        run.data_collator = lambda rows, seen=seen, collate=collate: seen.append(rows) or collate(rows)
        run.train()
        drawn.append([[row["input_ids"] for row in rows] for rows in seen])
    one, two = runs
    assert drawn[0] == drawn[1]
    assert one.controller.mixes == two.controller.mixes
    assert len({tuple(mix) for _, mix in one.controller.mixes}) > 1


def test_a_run_resumes_bit_by_bit(model, tmp_path):
    settings = {"mix_reward": "difficulty", "mix_policy": "mlp", "max_steps": 3, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = copy.deepcopy(model)
    one = stage_of(whole, tmp_path, **settings)
    one.train()
    two = stage_of(model, tmp_path, **settings)
    two.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed(model, weights(whole)) == set()
    assert one.controller.mixes == two.controller.mixes


def test_adapters_learn_alone(model, tmp_path):
    adapter = LoraConfig(target_modules=["q_proj"])
    stage = trainer(SingleTrainer, model, tmp_path, sums(SIZES), more={"peft_config": adapter}, max_steps=1)
    stage.train()
    assert {n.split(".")[-3] for n, p in stage.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


REJECTED = {
    "regret": (
        {"mix_reward": "regret"},
        "'regret' compares each domain with its specialist, and a single model has none",
    ),
    "a gate's term": ({"gate_balance": 0.1}, r"\['gate_balance'\] are settings of a gate"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_needs_specialists_or_a_gate_is_rejected(case, model, tmp_path):
    settings, message = REJECTED[case]
    with pytest.raises(ValueError, match=message):
        stage_of(model, tmp_path, **settings)


def test_a_fused_model_is_for_the_other_trainers(tmp_path):
    fused = UltraFuserForCausalLM.from_specialists({name: specialist("llama", layers=1) for name in "ab"})
    with pytest.raises(ValueError, match="trains one ordinary model, but got a fused one"):
        SingleTrainer(fused, SingleStageConfig(str(tmp_path), bf16=False, use_cpu=True), sums(SIZES))


@pytest.mark.e2e
def test_the_command_writes_a_folder_of_the_same_kind(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} is {i}"}) for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = [f"--data={name}={tmp_path / name}.jsonl" for name in ("a", "b")]
    words = [*data, "--examples-per-domain=2", "--per-device-train-batch-size=4", "--mix-reward=similarity"]
    paths = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--max-steps=2"]
    done = CliRunner().invoke(app, ["train", "--stage", "single", *paths, *words, "--mix-every=1", "--bf16=false"])
    assert done.exit_code == 0, done.output
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(trained) is type(model)
    assert not torch.equal(trained.lm_head.weight, model.lm_head.weight)
