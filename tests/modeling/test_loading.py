"""Weights stay in the files that they are read from: loading maps them, and training does not write to them."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's list of mapped files")
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def folders(tmp_path):
    """Three specialists of several sizes, one tied, in bfloat16."""
    for name, fields in {"text": {}, "code": {"tied": True, "layers": 3}, "math": {"hidden_size": 48}}.items():
        specialist(**fields).to(torch.bfloat16).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("text", "code", "math")}


@pytest.fixture
def fused(folders, tmp_path):
    """The fused model's folder."""
    UltraFuserForCausalLM.from_specialists(folders).save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def mapped(model, folder):
    """Names of the model's parameters that lie in a file under the folder."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors") and f" {folder}/" in line:
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    return {n for n, p in model.named_parameters() if any(a <= p.data_ptr() < b for a, b in ranges)}


def test_a_fused_folder_is_loaded_without_copying_any_of_it(fused):
    model = UltraFuserForCausalLM.from_pretrained(fused)
    assert mapped(model, fused) == {name for name, _ in model.named_parameters()}


def test_in_several_files_too(fused, tmp_path):
    UltraFuserForCausalLM.from_pretrained(fused).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model = UltraFuserForCausalLM.from_pretrained(tmp_path / "sharded")
    assert mapped(model, tmp_path / "sharded") == {name for name, _ in model.named_parameters()}


def test_specialists_that_are_fused_stay_in_their_files_and_only_head_and_gate_are_made(folders, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(folders)
    made = {name for name, _ in model.named_parameters()} - mapped(model, tmp_path)
    assert made == {
        name for name, _ in model.named_parameters() if name.startswith(("lm_head.", "model.fusion_gate."))
    }


def test_in_another_dtype_the_file_does_not_stay_in_memory_for_the_gate(fused):
    assert str(fused) not in Path("/proc/self/maps").read_text()
    model = UltraFuserForCausalLM.from_pretrained(fused, dtype="float16")
    assert {p.dtype for p in model.model.fusion_gate.parameters()} == {torch.float32}
    assert str(fused) not in Path("/proc/self/maps").read_text()


def test_a_pass_copies_nothing(fused):
    model = UltraFuserForCausalLM.from_pretrained(fused)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    model(IDS)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_changing_a_mapped_weight_leaves_the_file_as_it_was(fused):
    model = UltraFuserForCausalLM.from_pretrained(fused)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with safe_open(fused / "model.safetensors", "pt") as file:
        saved = file.get_tensor("lm_head.weight")
    assert not torch.equal(model.lm_head.weight, saved)
    assert torch.equal(UltraFuserForCausalLM.from_pretrained(fused).lm_head.weight, saved)
