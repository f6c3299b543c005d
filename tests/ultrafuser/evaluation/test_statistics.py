"""Intervals, differences, flips and calibration, against loops and known truths."""

import numpy as np
import pytest
import torch

from tests.support.tiny import tokenizer
from ultrafuser.evaluation.measurement import HeldOut, Scores, held_out
from ultrafuser.evaluation.resampling import calibration_error, flips, interval, permutation_test


LINES = ["what is 2+2? it is 4", "def read(self): return 1", "the value of the expression", "x = 3 * y + 4"]


@pytest.fixture
def data():
    rows = [{"text": line} for line in LINES]
    return held_out(rows, tokenizer(), prompt_tokens=5)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_an_interval_of_equal_examples_is_a_point():
    assert interval([(np.full(9, 6.0), np.full(9, 3.0))]) == pytest.approx([2.0, 2.0])


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sums = rng.normal(3.0, 1.0, size=60)
        low, high = interval([(sums, np.ones(60))], samples=400, level=0.9, seed=trial)
        covered += low <= 3.0 <= high
    # 90 % of 200, give or take three standard errors, and what percentiles of 60 examples lack
    assert 160 <= covered <= 193


def test_domains_count_alike_whatever_their_size():
    few, many = (np.full(2, 1.0), np.ones(2)), (np.full(200, 3.0), np.ones(200))
    assert interval([few, many]) == pytest.approx([2.0, 2.0])


def test_a_real_difference_is_found_and_none_is_not_invented():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=50)
    assert permutation_test([(noise + 1.0, np.ones(50))]) < 0.001
    found = [permutation_test([(rng.normal(size=30), np.ones(30))], samples=500, seed=s) for s in range(200)]
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.07)


def test_flips_and_retention_are_those_of_a_loop(data):
    def guesses(seed):
        correct = torch.rand(data.scored.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        return Scores(torch.zeros_like(correct, dtype=torch.float), correct, correct.float())

    here, there = guesses(0), guesses(1)
    pairs = list(zip(here.correct[data.scored].tolist(), there.correct[data.scored].tolist(), strict=True))
    found = flips(here, there, data)
    assert found["positive_flips"] == pytest.approx(sum(h and not t for h, t in pairs) / len(pairs))
    assert found["negative_flips"] == pytest.approx(sum(t and not h for h, t in pairs) / len(pairs))
    assert found["retention"] == pytest.approx(sum(h and t for h, t in pairs) / sum(t for _, t in pairs))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    # the first is the prompt
    confidence = torch.tensor([[0.5, 0.95, 0.95, 0.15, 0.15]])
    correct = torch.tensor([[False, True, False, False, False]])
    ids = torch.arange(5)[None]
    data = HeldOut(ids, torch.ones_like(ids), ids > 0)
    # two bins: 0.95 against one half, 0.15 against none
    found = calibration_error(Scores(-confidence.log(), correct, confidence), data, bins=10)
    assert found == pytest.approx((0.45 + 0.15) / 2, abs=1e-6)


# --- comparing -------------------------------------------------------------------------------------------------------


def rows(**others):
    """A fused model of mean loss 2 and 30 parameters, and others by (difference, p, parameters)."""
    made = [{"name": "fused", "mean": 2.0, "cost": {"parameters_per_token": 30}}]
    for name, (difference, p, size) in others.items():
        cost = {"parameters_per_token": size}
        made.append({"name": name, "mean": 2 + difference, "difference": difference, "p": p, "cost": cost})
    return {"rows": sorted(made, key=lambda row: row["mean"])}
