"""The experiment on mixes: what is trained on, and how well the order of mixes was told."""

import pytest
import torch

from experiments.mix_search_runs import check, mixture
from experiments.strategy_tables import agreement


def test_a_mixture_has_its_shares_and_begins_a_domain_again():
    pools = {"text": 10, "code": 20, "math": 30}
    blocks = {d: {"specialist": torch.arange(n)[:, None] + 100 * i} for i, (d, n) in enumerate(pools.items())}
    found = mixture(blocks, [0.6, 0.3, 0.1], 40)[:, 0].tolist()
    assert found == [*(list(range(10)) * 3)[:24], *range(100, 112), *range(200, 204)]


def test_agreement_is_spearmans_and_leaves_out_the_mix_that_was_found():
    trained, told = (1, 2, 3, 4, 5), (5, 6, 7, 9, 8)
    mixes = {
        str(t): {"trained": {"a": t, "b": -t}, "merge": {"a": p, "b": -2 * p}}
        for t, p in zip(trained, told, strict=True)
    }
    mixes["found"] = {"trained": {"a": 0, "b": 0}, "merge": {"a": 100, "b": 100}}
    # two neighbours changed places: 1 - 6 (1 + 1) / (5 (25 - 1))
    assert agreement(mixes, "merge", "a") == pytest.approx(0.9)
    assert agreement(mixes, "merge", "b") == pytest.approx(0.9)


def test_what_is_no_share_is_refused():
    check(mixes={"even": [0.5, 0.25, 0.25]})
    for wrong in ([0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match="which sum to 1, but 'odd' is"):
            check(mixes={"odd": wrong})
