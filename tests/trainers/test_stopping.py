"""Stage one ends when the loss on rows that nothing is trained on no longer falls, and keeps the best gate."""

import copy
import json

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, changed, conversations, weights
from tests.support.stages import trainer
from tests.support.tiny import specialist, tokenizer
from trainers import CachedGateTrainer, GateTrainer, JointTrainer
from trainers.domains import split
from ultrafuser.cli.app import app


NAMES = ("text", "code", "math")
# far too fast, so that the held-out loss soon rises
FAST = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_steps": 30, "examples_per_domain": 2}
STOPPING = {"early_stopping": 3, "eval_steps": 1, "held_out": 0.3, "save_total_limit": None, **FAST}


def rows(number=10):
    """By domain, rows of one token over and over, a token of their own."""
    ids = [[3 + i] * 40 for i in range(number * len(NAMES))]
    return {
        name: Dataset.from_list([{"input_ids": own, "labels": own} for own in ids[d * number :][:number]])
        for d, name in enumerate(NAMES)
    }


def stage(model, folder, cls=GateTrainer, *, callbacks=(), cache=None, **settings):
    more = {"callbacks": list(callbacks), **({"cache": cache} if cache else {})}
    return trainer(cls, model, folder, settings.pop("data", None), more=more, **{**STOPPING, **settings})


def held_out_losses(run):
    return {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}


@pytest.mark.e2e
@pytest.mark.parametrize("cached", [False, True])
def test_a_stage_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best_gate(cached, fused, tmp_path):
    cls, cache = (CachedGateTrainer, tmp_path / "cache") if cached else (GateTrainer, None)
    run = stage(fused, tmp_path / "out", cls, cache=cache)
    run.train()
    losses = held_out_losses(run)
    best, last = min(losses, key=losses.get), run.state.global_step
    assert list(losses) == list(range(1, last + 1))
    # three measurements in a row did not lower it, and never before
    assert last < STOPPING["max_steps"]
    assert best == last - 3
    assert max(losses.values()) > losses[best] + 0.01
    saved = load_file(tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors")
    gate = {name: tensor for name, tensor in weights(fused).items() if "fusion_gate" in name}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in gate.items())
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_without_early_stopping_it_goes_on_to_the_end_with_all_rows(fused, tmp_path):
    run = stage(fused, tmp_path, early_stopping=None, eval_steps=None, max_steps=5)
    run.train()
    assert run.state.global_step == 5
    assert run.eval_dataset is None
    assert len(run.train_dataset) == 8 + 6 + 9
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.grid
@pytest.mark.parametrize("cls", [GateTrainer, JointTrainer, CachedGateTrainer])
def test_nothing_is_trained_on_held_out_rows_not_even_pieces_of_them(cls, fused, tmp_path):
    cache = tmp_path / "cache" if cls is CachedGateTrainer else None
    run = stage(fused, tmp_path, cls, data=rows(), mixed_share=0.25, examples_per_domain=4, cache=cache)
    prepared = run.rows if cls is CachedGateTrainer else run.train_dataset
    trained = {i for row in prepared for i in row["input_ids"]}
    held = {i for row in run.eval_dataset for i in row["input_ids"]}
    assert "mixed" in set(prepared["domain"])
    assert not trained & held
    assert trained | held == set(range(3, 33))
    # of every domain its share
    assert sorted(run.eval_dataset["domain"]) == sorted(name for name in NAMES for _ in range(3))


def test_rows_that_are_given_to_be_measured_on_are_and_then_none_is_held_out(fused, tmp_path):
    given = Dataset.from_list(conversations(5))
    more = {"eval_dataset": given}
    run = trainer(GateTrainer, fused, tmp_path, more=more, **STOPPING)
    assert len(run.eval_dataset) == 5
    assert len(run.train_dataset) == 8 + 6 + 9


class Stop(TrainerCallback):
    """Interrupts before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.e2e
@pytest.mark.parametrize("cached", [False, True])
def test_an_interrupted_run_stops_where_one_that_was_not_does_with_the_same_gate(cached, fused, tmp_path):
    cls = CachedGateTrainer if cached else GateTrainer
    cache = tmp_path / "cache" if cached else None
    settings = {"mixed_share": 0.25, "gate_dropout": 0.1, "examples_per_domain": 4, "per_device_train_batch_size": 4}
    whole = copy.deepcopy(fused)
    one = stage(whole, tmp_path / "whole", cls, cache=cache, **settings)
    one.train()
    end = one.state.global_step
    assert end < STOPPING["max_steps"]
    # before the best was found, but not before the first checkpoint, and with one and two measurements since
    for step in (max(1, end - 4), end - 2, end - 1):
        folder = tmp_path / f"cut-{step}"
        with pytest.raises(KeyboardInterrupt):
            stage(copy.deepcopy(fused), folder, cls, cache=cache, callbacks=[Stop(step)], **settings).train()
        resumed = copy.deepcopy(fused)
        two = stage(resumed, folder, cls, cache=cache, **settings)
        two.train(resume_from_checkpoint=True)
        assert two.state.global_step == end
        assert held_out_losses(two) == held_out_losses(one)
        assert changed(resumed, weights(whole)) == set()


@pytest.mark.e2e
def test_a_run_that_stopped_is_resumed_to_the_gate_that_it_kept(fused, tmp_path):
    ended, again = copy.deepcopy(fused), copy.deepcopy(fused)
    one = stage(ended, tmp_path)
    one.train()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    two = stage(again, tmp_path)
    two.train(resume_from_checkpoint=True)
    assert two.state.global_step == one.state.global_step
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == checkpoints
    assert changed(again, weights(ended)) == set()


@pytest.mark.e2e
def test_a_second_training_begins_to_count_anew(fused, tmp_path):
    run = stage(fused, tmp_path, learning_rate=0.0)
    for _ in range(2):
        run.train()
        # the first measurement is the best, and three do not lower it
        assert run.state.global_step == 4


@pytest.mark.e2e
def test_a_run_that_never_stopped_early_can_go_on_with_stopping(fused, tmp_path):
    given = {"eval_dataset": Dataset.from_list(conversations(5))}
    plain = {**FAST, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer(GateTrainer, fused, tmp_path, more=given, **plain).train()
    run = trainer(GateTrainer, fused, tmp_path, more=given, **{**STOPPING, "max_steps": 4})
    run.train(resume_from_checkpoint=True)
    assert list(held_out_losses(run)) == [3, 4]


def test_a_domain_with_too_few_rows_is_refused_by_name(fused, tmp_path):
    few = {name: Dataset.from_list(conversations(size)) for name, size in {"text": 9, "code": 4}.items()}
    with pytest.raises(ValueError, match="10% of them, but 'code' has only 4 rows. Give it at least 6"):
        stage(fused, tmp_path, data=few, held_out=0.1)
    # what is advised is enough
    split({"code": Dataset.from_list(conversations(6))}, 0.1, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"early_stopping": 0}, "`early_stopping` must be at least 1, but is 0"),
        ({"early_stopping": -1}, "`early_stopping` must be at least 1"),
        ({"early_stopping": "soon"}, "`early_stopping` must be int or nothing"),
        ({"early_stopping": True}, "`early_stopping` must be int or nothing"),
        ({"held_out": 0.0}, "`held_out` is a share"),
        ({"held_out": 1.0}, "`held_out` is a share"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, sentence, fused, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        stage(fused, tmp_path, **settings)


# ---- the command


@pytest.fixture
def recipe(tmp_path):
    """A recipe for stage one of a model with the default gate, and the settings it is written from."""
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in NAMES[:2]})
    model.save_pretrained(tmp_path / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "fused")
    for name in NAMES[:2]:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(12)))
    written = {
        "stage": "gate",
        "model_name_or_path": str(tmp_path / "fused"),
        "output_dir": str(tmp_path / "out"),
        "domains": {n: {"path": "json", "data_files": str(tmp_path / f"{n}.jsonl")} for n in NAMES[:2]},
        "early_stopping": 2,
        "eval_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        **FAST,
        "per_device_train_batch_size": 2,
    }

    def write(**changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**written, **changes}))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.e2e
@pytest.mark.parametrize("cached", [False, True])
def test_a_recipe_stops_early_too(cached, recipe, tmp_path):
    done = CliRunner().invoke(app, ["train", recipe(cached=cached)])
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    last = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    state = json.loads((out / f"checkpoint-{last}" / "trainer_state.json").read_text())
    assert last < FAST["max_steps"]
    assert state["best_global_step"] == last - 2
    best, kept = (load_file(f / "model.safetensors") for f in (out / f"checkpoint-{last - 2}", out))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in best.items())


def test_a_recipe_with_too_few_rows_is_refused_in_words(recipe, tmp_path):
    (tmp_path / "code.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(3)))
    done = CliRunner().invoke(app, ["train", recipe()])
    assert done.exit_code == 2
    assert "'code' has only 3 rows. Give it at least 6" in " ".join(done.output.replace("│", "").split())


@pytest.mark.e2e
def test_gates_that_are_compared_stop_early_on_one_cache(recipe, tmp_path, monkeypatch):
    seen, plain = [], CachedGateTrainer._said_of
    monkeypatch.setattr(CachedGateTrainer, "_said_of", lambda self, rows: seen.extend(rows) or plain(self, rows))
    given = ["--model", tmp_path / "fused", "--out", tmp_path / "gated", "--gate", "linear", "--seeds", 2]
    recipe()
    given += [word for name in NAMES[:2] for word in ("--data", f"{name}={tmp_path / name}.jsonl")]
    settings = {"early_stopping": 2, "eval_steps": 1, "report_to": "none", "disable_tqdm": True, **FAST}
    settings |= {"per_device_train_batch_size": 2}
    given += [word for key, value in settings.items() for word in (f"--{key}", value)]
    done = CliRunner().invoke(app, ["gates", *map(str, given)])
    assert done.exit_code == 0, done.output
    # 12 rows of each domain less 1 that gates are compared on and 1 that they stop by, and a quarter mixed, once
    assert seen == list(range(20 + 7))
