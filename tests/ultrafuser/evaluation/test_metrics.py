"""Metrics load from their folders without a network, and say what loops by hand say."""

import math
import random

import pytest
import torch

from ultrafuser.evaluation.measurement import HeldOut, Scores
from ultrafuser.evaluation.metrics import NAMES, path
from ultrafuser.evaluation.resampling import flips


evaluate = pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(path(name), cache_dir=str(tmp_path))


def test_every_metric_loads_and_describes_its_inputs(load):
    for name in NAMES:
        metric = load(name)
        assert metric.name == name
        assert all(feature in metric.inputs_description for feature in metric.features)
    with pytest.raises(ValueError, match=r"\['calibration_error', 'flips', 'nats_per_token'\], but got 'flip'"):
        path("flip")


def test_loss_counts_tokens_and_not_examples(load):
    probabilities = [[0.5, 0.25], [], [0.125]]
    found = load("nats_per_token").compute(log_probabilities=[[math.log(p) for p in row] for row in probabilities])
    assert found == {"nats_per_token": pytest.approx((1 + 2 + 3) * math.log(2) / 3), "tokens": 3}
    with pytest.raises(ValueError, match="need a token"):
        load("nats_per_token").compute(log_probabilities=[[]])


def test_flips_are_counted_both_ways_and_as_in_the_comparison(load):
    before = [random.random() < 0.6 for _ in range(200)]
    after = [random.random() < 0.7 for _ in range(200)]
    mended = broken = kept = 0
    for was, is_now in zip(before, after, strict=True):
        mended += not was and is_now
        broken += was and not is_now
        kept += was and is_now
    found = load("flips").compute(before=before, after=after)
    assert found["positive_flips"] == mended / 200
    assert found["negative_flips"] == broken / 200
    assert found["retention"] == kept / sum(before)
    scores = [Scores(None, torch.tensor([right]), None) for right in (after, before)]
    ours = flips(*scores, HeldOut(None, None, torch.ones(1, 200, dtype=torch.bool)))
    assert found == pytest.approx(ours)


def test_retention_of_nothing_is_unknown(load):
    assert load("flips").compute(before=[False], after=[True])["retention"] is None


@pytest.mark.parametrize("bins", [4, 15])
def test_calibration_error_is_the_gap_by_bin(bins, load):
    confidence = [random.random() for _ in range(300)] + [1.0, 0.0]
    correct = [random.random() < c**2 for c in confidence]
    expected = 0
    for b in range(bins):
        inside = [
            i for i, c in enumerate(confidence) if b / bins <= c < (b + 1) / bins or (c == 1.0 and b == bins - 1)
        ]
        if inside:
            sure = sum(confidence[i] for i in inside) / len(inside)
            right = sum(correct[i] for i in inside) / len(inside)
            expected += len(inside) / len(confidence) * abs(sure - right)
    found = load("calibration_error").compute(confidence=confidence, correct=correct, bins=bins)
    assert found["calibration_error"] == pytest.approx(expected)


def test_a_model_as_right_as_it_is_sure_has_no_calibration_error(load):
    found = load("calibration_error").compute(confidence=[0.75] * 4, correct=[True, True, True, False])
    assert found["calibration_error"] == pytest.approx(0, abs=1e-9)
