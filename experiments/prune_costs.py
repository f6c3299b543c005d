"""Measures what is lost when six specialists become three: pruned after fusing, or picked before.

Beside the three specialists of a domain each there are their base and two that are halfway from it to a specialist, which
somebody who fuses what is at hand would have, too.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from experiments.baseline_runs import (
    Fusions,
    check_gate,
    examples_of,
    folder_of,
    kept,
    load,
    loss_of,
    specialists_of,
)
from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import GateStageConfig
from ultrafuser.build.picking import choose
from ultrafuser.build.pruning import rank_subsets
from ultrafuser.build.specialist_edits import keep_specialists
from ultrafuser.evaluation.measurement import score
from ultrafuser.provenance import digest
from ultrafuser.quickstart.corpora import DOMAINS


HALFWAY = ("text", "code")


def prune(
    seed: int,
    work: Path,
    *,
    base: dict,
    specialist: dict,
    gate: str,
    fusion: str,
    stage: dict,
    again: dict,
    keep: int,
    examples_per_domain: int,
) -> dict:
    """Fuses six and prunes them; and picks some of six, and fuses those. Chosen on one half of held-out text, measured on the other.

    Args:
        seed: As for `rivals`, and so are all others but `again` and `keep`.
        again: Settings of the further steps of stage one after pruning.
        keep: Number of specialists to keep.

    Returns:
        Held-out nats per token by model and domain, and names of the specialists that were kept and picked.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, _ = specialists_of(seed, folder, base, specialist)
        fusions = Fusions(folder, tokenizer, {d: blocks[d]["fuse"] for d in DOMAINS}, examples_per_domain, seed)
        held = {d: blocks[d]["held_out"] for d in DOMAINS}
        chosen_on, tests = ({d: examples_of(x[k::2], tokenizer) for d, x in held.items()} for k in (0, 1))
        pool = {name: folder / name for name in ("base", *DOMAINS)}
        pool |= {
            f"{d}_halfway": kept(folder / f"{d} halfway", lambda d=d: halfway(folder, d), tokenizer) for d in HALFWAY
        }

        def fused(names) -> UltraFuserForCausalLM:
            def trained() -> UltraFuserForCausalLM:
                set_seed(seed)
                model = UltraFuserForCausalLM.from_specialists({n: pool[n] for n in names}, gate=gate, fusion=fusion)
                fusions.train(model, stage)
                return model

            made_of = [list(names), fusions.size, gate, fusion, stage]
            return load(kept(folder / f"fused {digest(made_of)}", trained, tokenizer))

        six = fused(pool)
        best = rank_subsets(six, keep, chosen_on)[1].names
        pruned = keep_specialists(six, best)
        log_probs = {name: _log_probs(load(path), chosen_on) for name, path in pool.items()}
        picked = [pick.name for pick in choose(log_probs, chosen_on, keep) if pick.picked]
        models = {"six": six, "pruned": pruned, "picked": fused(picked), "by name": fused(DOMAINS)}
        found = {name: _losses(model, tests) for name, model in models.items()}
        set_seed(seed)
        fusions.train(pruned, again)
        found["pruned, trained again"] = _losses(pruned, tests)
    return {"nats_per_token": found, "kept": list(best), "picked": picked}


def halfway(folder: Path, domain: str) -> PreTrainedModel:
    """Makes a model whose weights are the mean of the base's and a specialist's."""
    model, base = load(folder / domain), load(folder / "base")
    with torch.no_grad():
        for mine, its in zip(model.parameters(), base.parameters(), strict=True):
            mine.lerp_(its, 0.5)
    return model


def _log_probs(model: PreTrainedModel, data: Mapping) -> dict:
    return {d: -score(model, examples).losses for d, examples in data.items()}


def _losses(model: PreTrainedModel, tests: Mapping) -> dict[str, float]:
    return {d: loss_of(model, examples) for d, examples in tests.items()}


def check(*, again: dict, **gate) -> None:
    """Checks that the gate exists, with settings that stage one takes."""
    check_gate(**gate)
    GateStageConfig("nowhere", bf16=False, **again)


RUNS = {"pruning": prune}
CHECKS = {"pruning": check}
