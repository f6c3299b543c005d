"""Serving at a real size, in small: every way is measured, and one that says something else is no way."""

import json

import pytest
import torch

from benchmarks import real_serving
from experiments.real.workshop import Workshop
from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support import small_study
from tests.support.tiny import stir_gate


@pytest.fixture
def folder(tmp_path):
    shop = Workshop(small_study.make(tmp_path / "work"), 0, **small_study.MATERIALS)
    model = UltraFuserForCausalLM.from_specialists(shop.sources(), base=str(shop.base), dtype="float32")
    stir_gate(model)
    model.save_pretrained(tmp_path / "fused")
    shop.tokenizer.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.mark.e2e
def test_every_way_is_measured_beside_one_specialist(folder, tmp_path, monkeypatch):
    for name, value in (("BATCHES", (1, 2)), ("NEW", 3), ("PREFILL", 8)):
        monkeypatch.setattr(real_serving, name, value)
    with torch.no_grad():
        real_serving.measure(folder, None, 2, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    names = ["one specialist", "fused, adapters", "fused", "fused, stacked", "dense, three times the size"]
    assert list(found["parameters"]) == names
    assert found["parameters"]["fused, adapters"] < found["parameters"]["fused"]
    for batch in ("1", "2"):
        assert list(found["prefill"][batch]) == [f"{name}, transformers" for name in names]
        decoded = [*names, "fused, self-drafting"]
        assert list(found["decoding"][batch]) == [f"{name}, transformers" for name in decoded]
        assert found["decoding"][batch]["one specialist, transformers"]["median"] == 1.0
    rows = real_serving.table(found, "decoding").splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {name}, transformers" for name in decoded]
    assert {row.count("|") for row in rows} == {5}


def test_a_way_that_says_something_else_is_told():
    ways = {"fused, transformers": lambda asked, new: ([[1]], 0.0), "fused, vLLM": lambda asked, new: ([[2]], 0.0)}
    with pytest.raises(RuntimeError, match="fused, vLLM continues prompts otherwise than fused, transformers"):
        real_serving.same_tokens(ways, [[0]])
