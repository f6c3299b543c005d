"""The training scripts, as their users start them, on local stand-ins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.tiny import tokenizer
from tests.training import CHAT_TEMPLATE, conversations
from trainers import GateStageConfig, JointStageConfig


EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {"max_steps": 2, "examples_per_domain": 2, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True}


@pytest.fixture
def recipe(specialists, tmp_path):
    """A recipe with local specialists and one file of conversations per domain."""
    for name, model in specialists.items():
        model.save_pretrained(tmp_path / name)
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / name)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(c) for c in conversations(6)))
    domains = {n: {"path": "json", "data_files": str(tmp_path / f"{n}.jsonl")} for n in specialists}
    return {"domains": domains, "dtype": "float32", "report_to": "none", "save_strategy": "no", **SMALL}


def run(script, recipe, folder, *options):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, str(EXAMPLES / script), "--config", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_both_stages_run_from_recipes_one_after_the_other(recipe, specialists, tmp_path):
    gate, joint = tmp_path / "gate", tmp_path / "joint"
    fuse = {"specialists": {n: str(tmp_path / n) for n in specialists}, "output_dir": str(gate)}
    learned = {"mix_reward": "regret", "mix_every": 1, "mix_delay": 1}
    run("train_gate.py", {**recipe, **fuse, **learned}, tmp_path, "--learning_rate", "0.01")
    trained = {"model_name_or_path": str(gate), "trust_remote_code": True, "output_dir": str(joint)}
    run("train_joint.py", {**recipe, **trained}, tmp_path)
    one, two = (AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True) for f in (gate, joint))
    ids = torch.arange(3, 9)[None]
    for name, model in specialists.items():
        assert torch.equal(one.specialist(name)(ids).logits, model(ids).logits)
        assert not torch.equal(two.specialist(name)(ids).logits, model(ids).logits)


# those that make data are for another command
TRAINING = sorted(p for p in (EXAMPLES / "recipes").glob("*.yaml") if "stage:" in p.read_text())


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_every_field_of_every_recipe_is_one_that_its_script_reads(path):
    from trl import ModelConfig

    from ultrafuser.training import FusedArguments

    stage = JointStageConfig if "joint" in path.stem else GateStageConfig
    known = {f for cls in (stage, ModelConfig, FusedArguments) for f in cls.__dataclass_fields__}
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe) <= known
    batch = recipe["examples_per_domain"] * len(recipe["domains"])
    assert batch % recipe["per_device_train_batch_size"] == 0
