"""The table of failures says what is said, and names tests that are there; and tests of failures that had none."""

import ast
import re
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoTokenizer
from trl import ModelConfig
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from tests import failures
from tests.support.conversations import CHAT_TEMPLATE, changed, conversations, sft_trainer, weights
from tests.support.stand_ins import many_words
from tests.support.tiny import specialist, tokenizer
from trainers import GateTrainer, JointTrainer
from ultrafuser.cli.app import app
from ultrafuser.train.stage_recipe import FusedArguments, load_model


TESTS = {path.name: path for path in Path(__file__).parents[1].rglob("test_*.py")}
ROWS = {row[0]: row for row in failures.ROW.findall(failures.PAGE.read_text())}


@pytest.mark.grid
@pytest.mark.parametrize("name", failures.PROVOCATIONS)
def test_a_message_in_the_table_is_what_is_said(name):
    assert ROWS[name][3] == failures.said(name), "python -m tests.failures writes it anew"


@pytest.mark.parametrize("name", ROWS)
def test_every_failure_has_a_test_that_is_there(name):
    *_, message, tests = ROWS[name]
    assert ("`` " in message) == (name in failures.PROVOCATIONS), "what is quoted is provoked"
    assert tests
    for test in tests.split("<br>"):
        file, _, function = test.strip("`").partition("::")
        tree = ast.parse(TESTS[file].read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_is_read():
    lines = [line for line in failures.PAGE.read_text().splitlines() if line.startswith("| ")]
    heads = [line for line in lines if not line.startswith("| <a ")]
    assert len(set(heads)) == 1
    assert len(lines) - len(heads) == len(ROWS)


# ---------------------------------------------------------------------------------- failures without a place elsewhere


def test_the_constructor_reads_no_weights(fused):
    config = UltraFuserConfig.from_dict(fused.config.to_dict())
    with torch.device("meta"):
        model = UltraFuserForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in fused.named_parameters()}


@pytest.mark.e2e
def test_tokens_that_one_specialist_has_behind_the_common_ones_are_left_out_by_every_way_to_fuse(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    failures.save("text", template=CHAT_TEMPLATE)
    for name in ("code", "math"):
        failures.save(name, words=many_words(99, ["<fill>", "<hole>"]), vocab_size=101, template=CHAT_TEMPLATE)
    for words in (
        ["fuse", "code=code", "text=text", "--out", "two"],
        ["add", "two", "math=math", "--out", "three"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    fused, words = UltraFuserForCausalLM.from_pretrained("three"), AutoTokenizer.from_pretrained("three")
    assert fused.config.vocab_size == len(words) == 99
    # a recipe of training fuses, too
    recipe = FusedArguments(specialists={"code": "code", "text": "text"})
    assert len(load_model(recipe, ModelConfig())[1]) == 99


def test_one_model_under_two_names_is_saved_whole_and_comes_back(tmp_path):
    model = specialist(tied=True)
    fused = UltraFuserForCausalLM.from_specialists({"text": model, "code": model})
    fused.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(fused.state_dict())
    loaded, info = UltraFuserForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, fused(ids).logits)


def test_experts_inside_specialists_ask_no_trainer_for_a_loss_of_their_own(tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    parts = {"text": specialist(layers=1), "code": specialist("mixtral", layers=1, **experts)}
    model = UltraFuserForCausalLM.from_specialists(parts)
    before = weights(model)
    trainer = sft_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    assert any("experts" in name for name in changed(model, before))
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)


def test_a_gate_learns_with_gradient_checkpointing_asked_for(tmp_path):
    model = failures.tiny()
    before = weights(model)
    failures.stage(GateTrainer, model, folder=str(tmp_path), gradient_checkpointing=True).train()
    assert {name.split(".")[1] for name in changed(model, before)} == {"fusion_gate"}


@pytest.mark.parametrize("stage", [GateTrainer, JointTrainer])
def test_training_reads_the_tokens_that_generation_reads(stage, tmp_path):
    rows = conversations(4)
    data = {name: Dataset.from_list(rows) for name in ("text", "code")}
    trained = failures.stage(stage, data=data, folder=str(tmp_path / "out")).train_dataset["input_ids"]
    # as whoever loads the saved folder has it
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "saved")
    words = type(tokenizer()).from_pretrained(tmp_path / "saved")
    for row in rows:
        prompt = words.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
        answer = words.encode(row["messages"][1]["content"], add_special_tokens=False)
        assert any(ids[: len(prompt) + len(answer)] == prompt + answer for ids in trained)


def test_no_layer_is_split_between_devices(fused):
    blocks = [module for module in fused.modules() if type(module).__name__ in fused._no_split_modules]
    assert len(blocks) == fused.config.num_hidden_layers
    whole = sum(4 * p.numel() for p in fused.parameters())
    for part in range(1, 10):
        room = {"cpu": whole * part // 10}
        places = infer_auto_device_map(fused, room, no_split_module_classes=fused._no_split_modules)
        assert not [name for name in places if re.search(r"\.layers\.\d+\.", name)]
    assert set(places.values()) == {"cpu", "disk"}
