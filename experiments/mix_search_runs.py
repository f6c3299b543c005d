"""Measures how well merges of single domains' models tell which mix of data is best, without training on any.

The base is that of `baseline_runs`. A model of a mix is the base tuned as long as that of one domain is, on as many blocks of the
specialists' data, in the mix's shares. Merges are measured on text to fuse with, as a user would, and the models that are
trained on mixes on held-out text.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from experiments.baseline_runs import examples_of, folder_of, load, specialists_of
from ultrafuser.evaluation.measurement import mean_loss
from ultrafuser.merge.coefficients import Coefficients
from ultrafuser.merge.merged_model import merge
from ultrafuser.merge.search_simplex import simplex_search
from ultrafuser.quickstart.corpora import DOMAINS


Losses = dict[str, float]
FOUND = "found"
EXAMPLES = 24  # of each domain to measure on
BATCH = 8  # of `pretrain`


def run(seed: int, work: Path, *, base: dict, specialist: dict, tuned: dict, mixes: dict[str, list[float]]) -> dict:
    """Trains on mixes, and predicts how that ends.

    Args:
        seed: As for `rivals` of `baseline_runs`, and so are `work`, `base` and `specialist`.
        work: Folder for models.
        tuned: Steps and rate of models of one domain and of mixes.
        mixes: Shares of the domains by name.

    Returns:
        By mix, and by the one that the search finds: its shares, and nats per token by domain: `trained`; of a `merge` with
        these factors; and `alone`, the mean of the losses of the domains' models with these weights. The `error` of the fit.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, make = specialists_of(seed, folder, base, specialist)
        tune, tests = (
            {d: examples_of(blocks[d][s][:EXAMPLES], tokenizer) for d in DOMAINS} for s in ("fuse", "held_out")
        )
        start = load(folder / "base")

        def trained(name: str, shares: list[float]) -> PreTrainedModel:
            data = mixture(blocks, shares, BATCH * tuned["steps"])
            return load(make(f"mix {name}", partial(load, folder / "base"), data, **tuned))

        alone = {d: trained(f"{d} alone", [float(d == other) for other in DOMAINS]) for d in DOMAINS}

        def merged(shares: list[float]) -> Losses:
            table = Coefficients.constant(dict(zip(DOMAINS, shares, strict=True)), start.config.num_hidden_layers)
            model = merge(alone, "task_arithmetic", base=start, coefficients=table)
            return {d: mean_loss(model, x) for d, x in tune.items()}

        found = simplex_search(merged, len(DOMAINS), seed=seed)
        own = {name: {d: mean_loss(model, x) for d, x in tune.items()} for name, model in alone.items()}
        rows = {}
        for name, shares in {**mixes, FOUND: found.best.factors}.items():
            model = trained(name, shares)
            rows[name] = {
                "shares": dict(zip(DOMAINS, shares, strict=True)),
                "trained": {d: mean_loss(model, x) for d, x in tests.items()},
                "merge": merged(shares),
                "alone": {d: sum(p * own[n][d] for n, p in zip(DOMAINS, shares, strict=True)) for d in DOMAINS},
            }
        return {"mixes": rows, "error": found.error, "base": {d: mean_loss(start, x) for d, x in tests.items()}}


def mixture(blocks: dict[str, dict[str, Tensor]], shares: list[float], number: int) -> Tensor:
    """Takes blocks of the specialists' data by shares; a domain begins again where it has too few. Shape (~number, length)."""
    pools = [blocks[d]["specialist"] for d in DOMAINS]
    return torch.cat(
        [pool[torch.arange(round(p * number)) % len(pool)] for pool, p in zip(pools, shares, strict=True)]
    )


def check(*, mixes: dict[str, list[float]], **_) -> None:
    """Checks that mixes are shares."""
    for name, shares in mixes.items():
        if len(shares) != len(DOMAINS) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise ValueError(f"A mix is a share of each of {DOMAINS}, which sum to 1, but {name!r} is {shares}.")


RUNS = {"mix_search": run}
CHECKS = {"mix_search": check}
