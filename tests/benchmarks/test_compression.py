"""The benchmark of compressed specialists at its smallest size."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import compression
from tests.support.tuned import NAMES, make
from ultrafuser.evaluation.measurement import held_out


@pytest.mark.e2e
def test_shares_and_weights_are_those_of_the_models(tmp_path):
    make(tmp_path, rank=2)
    torch.manual_seed(0)
    rows = [{"input_ids": row} for row in torch.randint(3, 99, (2, 48)).tolist()]
    held = {name: held_out(rows, None, prompt_tokens=8) for name in NAMES}
    row = compression.measure(tmp_path / "base", tmp_path, held, 2, "base")
    # a change of rank 2 is whole at rank 2, so that of whatever tuning gave or took all is kept
    assert all(of["compressed"] == pytest.approx(of["full"], abs=1e-4) for of in row["losses"].values())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    widths = sum(sum(p.shape) for p in base.parameters() if p.ndim == 2)
    numbers = base.num_parameters() + 3 * 2 * widths
    assert row["memory against three fused"] == pytest.approx(numbers / (3 * base.num_parameters()))
