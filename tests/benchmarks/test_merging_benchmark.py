"""The benchmark of merges at its smallest size."""

import pytest
import torch

from benchmarks import merging
from tests.support.tuned import NAMES, make


@pytest.mark.slow
def test_every_row_has_the_losses_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "STEPS", 2)
    make(tmp_path, layers=3)  # layer swapping needs a layer in the middle
    blocks = {d: {p: torch.randint(3, 99, (8, 48)) for p in ("fuse", "held_out")} for d in NAMES}
    losses = merging.measure(tmp_path, blocks, 4, 0)
    assert {*merging.MERGED, "base", "fused, posterior", "experts, donor text, routers trained"} < losses.keys()
    assert all(of.keys() == set(NAMES) and all(0 < loss < 50 for loss in of.values()) for of in losses.values())
    assert losses["experts, average"] != losses["experts, average, routers trained"]
