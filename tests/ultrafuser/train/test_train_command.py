"""Both stages from the command line: what a recipe or flags say, and going on after a kill."""

import json
import pickle
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import ModelConfig
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.tiny import specialist, tokenizer
from trainers import GateStageConfig, GateTrainer
from ultrafuser.cli.app import app
from ultrafuser.train import stage_recipe


NAMES = ["text", "code"]
SMALL = {"examples_per_domain": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}


@pytest.fixture
def fused(tmp_path):
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in NAMES})
    model.save_pretrained(tmp_path / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "fused")
    (tmp_path / "fused" / "specialists.json").write_text(json.dumps({"code": {"source": "o/code", "commit": "abc"}}))
    for name in NAMES:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(6)))
    return tmp_path / "fused"


def flags(fused, out):
    """All of a run, without a recipe."""
    data = [word for name in NAMES for word in ("--data", f"{name}={fused.parent / name}.jsonl")]
    small = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    return ["--model", fused, "--out", out, *data, *small]


def run(*words):
    return CliRunner().invoke(app, ["train", *map(str, words)])


def tensors(folder):
    return load_file(folder / "model.safetensors")


def changed(one, other):
    a, b = tensors(one), tensors(other)
    return {key for key in a if not torch.equal(a[key], b[key])}


@pytest.mark.e2e
def test_a_recipe_trains_the_gate_and_flags_then_everything(fused, tmp_path):
    data = {n: {"path": "json", "data_files": str(tmp_path / f"{n}.jsonl")} for n in NAMES}
    gate, joint = tmp_path / "gate", tmp_path / "joint"
    written = {"stage": "gate", "model_name_or_path": str(fused), "output_dir": str(gate), "domains": data, **SMALL}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    done = run(tmp_path / "recipe.yaml", "--max-steps", 2, "--learning_rate", 0.01)
    assert done.exit_code == 0, done.output
    assert changed(fused, gate)
    assert all(key.startswith("model.fusion_gate.") for key in changed(fused, gate))
    assert json.loads((gate / "specialists.json").read_text()) == {"code": {"source": "o/code", "commit": "abc"}}
    assert json.loads((gate / "checkpoint-2" / "trainer_state.json").read_text())["max_steps"] == 2

    done = run("--stage", "joint", *flags(gate, joint), "--max-steps", 1)
    assert done.exit_code == 0, done.output
    assert {"lm_head.weight", "model.specialists.text.embed_tokens.weight"} <= changed(gate, joint)


@pytest.mark.grid
@pytest.mark.parametrize(
    "settings",
    [
        {"gate_entropy": float("nan")},
        {"gate_balance": float("inf")},
        {"learning_rate": 10**400},
        {"mixed_share": 10**400},
        {"mixed_share": [0.1]},
        {"gate_dropout": "x"},
        {"warmup_steps": 10**400},
        {"dataset_text_field": ["text"]},
        {"resume_from_checkpoint": 5},
        {"report_to": "wandb"},
        {"report_to": {"a": 1}},
        {"lr_scheduler_kwargs": {"a": 1}},
        {"lr_scheduler_kwargs": [1]},
        {"dataset_kwargs": [1]},
        {"dataloader_num_workers": 1_000_000},
        {"push_to_hub": True, "hub_model_id": "me/model"},
        {"model_name_or_path": 2},
        {"attn_implementation": ["sdpa"]},
        {"cached": "perhaps"},
        {"specialist_revisions": ["main"]},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_a_recipes_setting_of_another_kind_is_refused_by_name(settings, fused, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.checked_config.get_available_reporting_integrations", lambda: ["tensorboard"])
    written = {"stage": "gate", "model_name_or_path": str(fused), "output_dir": str(tmp_path / "out"), **settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    done = run(tmp_path / "recipe.yaml")
    assert done.exit_code == 2, done.output
    assert next(iter(settings)) in done.output
    assert len(done.output) < 400


@pytest.mark.e2e
def test_a_stage_goes_on_from_its_last_checkpoint_to_where_it_would_have_ended(fused, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["--stage", "gate", "--max-steps", 3, "--save_steps", 2]
    done = run(*words, *flags(fused, whole), "--resume")
    assert done.exit_code == 0, done.output
    assert "the beginning" in done.output
    # what a kill between the second and the third step leaves
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")

    done = run(*words, *flags(fused, cut))
    assert done.exit_code == 2
    assert "--resume" in done.output
    done = run(*words, *flags(fused, cut), "--resume")
    assert done.exit_code == 0, done.output
    assert "cut/checkpoint-2" in done.output
    assert not changed(whole, cut)
    assert changed(whole, whole / "checkpoint-2")


def test_a_misspelt_option_is_told_its_neighbour(fused, tmp_path):
    done = run("--stage", "gate", *flags(fused, tmp_path / "out"), "--max_stepz", 3)
    assert done.exit_code == 2
    assert "'--max_stepz'" in done.output
    assert "--max_steps" in done.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--stage", "gate", "--model", "./no-such-model"),
            "There is no model at './no-such-model': neither such a folder",
        ),
        (("no-such-recipe.yaml",), "There is no file 'no-such-recipe.yaml'. A recipe is a YAML file."),
    ],
)
def test_a_model_or_recipe_that_is_not_there_is_named_before_data_are_read(words, told, tmp_path):
    done = run(*words, "--out", tmp_path / "out", "--data", "text=no-such-file.jsonl")
    assert done.exit_code == 2
    assert told in done.output


def test_a_finished_model_is_not_overwritten(fused):
    before = tensors(fused)
    done = run("--stage", "gate", *flags(fused, fused))
    assert done.exit_code == 2
    assert "Nothing is overwritten" in done.output
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(fused).items())


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ({}, (), "A stage is one of"),
        ({"stage": "third"}, (), "'third'"),
        ({"stage": "gate", "output_dir": "out", "learning_rat": 1}, (), "learning_rat"),
        ({"stage": "gate", "output_dir": "out"}, (), "Add `domains:`"),
        ({"stage": "gate", "output_dir": "out"}, ("--data", "text"), "NAME=VALUE"),
        (["stage"], (), "holds a list"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(recipe, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run("recipe.yaml", *words)
    assert done.exit_code == 2
    assert said in done.output


def test_no_token_is_written_and_what_is_pushed_is_the_model(fused, tmp_path, monkeypatch):
    token, sent = "hf_" + "S" * 34, []
    out = tmp_path / "out"

    def push(folder, repository, **options):
        sent.append((folder, repository, options))
        assert load_file(folder / "model.safetensors")

    monkeypatch.setattr(stage_recipe.upload, "push", push)
    more = ["--hub_token", token, "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    done = run("--stage", "gate", *flags(fused, out), *more, "--push_to_hub", "true", "--hub_model_id", "me/model")
    assert done.exit_code == 0, done.output
    assert list(out.glob("checkpoint-*/training_args.bin"))
    assert not [p for p in out.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    options = {"private": None, "revision": None, "token": token}
    assert [(f, r, {k: o[k] for k in options}) for f, r, o in sent] == [(out, "me/model", options)]


def test_a_trainer_neither_pushes_its_folder_nor_pickles_a_token(fused, tmp_path):
    secret = "hf_" + "S" * 34
    options = {"report_to": "none", "use_cpu": True, "bf16": False}
    args = GateStageConfig(str(tmp_path / "a"), hub_token=secret, model_init_kwargs={"token": secret}, **options)
    assert secret.encode() not in pickle.dumps(args)
    assert args.hub_token == secret
    assert pickle.loads(pickle.dumps(args)).learning_rate == args.learning_rate
    done = run("--stage", "gate", *flags(fused, tmp_path / "b"), "--push_to_hub", "true")
    assert done.exit_code == 2
    assert "`hub_model_id` is None" in done.output
    args = GateStageConfig(str(tmp_path / "c"), push_to_hub=True, **options)
    with pytest.raises(ValueError, match="would send all that is in its output folder"):
        GateTrainer(
            str(fused), args, {"text": Dataset.from_list([{"text": "a"}]), "code": Dataset.from_list([{"text": "a"}])}
        )


@pytest.mark.e2e
@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_ended_is_resumed_to_the_bit_that_it_ended_with(steps, fused, tmp_path):
    out = tmp_path / "out"
    # a rate that does not end at zero; after 3 steps an epoch is under way
    words = ["--stage", "gate", *flags(fused, out), "--max-steps", steps, "--save_steps", 2]
    words += ["--lr_scheduler_type", "constant", "--learning_rate", 0.01]
    assert run(*words).exit_code == 0
    whole, checkpoints = tensors(out), sorted(path.name for path in out.glob("checkpoint-*"))
    assert run(*words, "--resume").exit_code == 0
    assert sorted(path.name for path in out.glob("checkpoint-*")) == checkpoints
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(out).items())
    # killed between the last checkpoint and the model
    for file in ("model.safetensors", "config.json"):
        (out / file).unlink()
    assert run(*words, "--resume").exit_code == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(out).items())


def test_weights_that_no_run_left_are_not_replaced(fused, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("years of work")
    done = run("--stage", "gate", *flags(fused, out), "--max-steps", 1)
    assert done.exit_code == 2
    assert "holds 'model.safetensors', which `ultrafuser train` writes" in done.output
    assert (out / "model.safetensors").read_text() == "years of work"


def test_a_folder_of_adapters_of_a_fused_model_is_loaded_with_it(fused, tmp_path):
    model = UltraFuserForCausalLM.from_pretrained(fused)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    tokenizer().save_pretrained(tmp_path / "adapters")
    loaded, _ = stage_recipe.load_model(
        stage_recipe.FusedArguments(), ModelConfig(model_name_or_path=str(tmp_path / "adapters"))
    )
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
