"""Models that experiments share: written whole or not at all, and made again where a killed run left an empty folder."""

import pytest

from experiments.baseline_runs import kept
from tests.support.tiny import specialist, tokenizer


def test_a_model_is_made_once_and_a_folder_without_one_is_none(tmp_path):
    # what a trainer makes before it trains
    (tmp_path / "base").mkdir()
    target = kept(tmp_path / "base", specialist, tokenizer())
    assert (target / "model.safetensors").exists()
    kept(target, lambda: pytest.fail("it is there"), tokenizer())
