"""Measures what adding and removing a specialist costs: at once, after a few steps, and beside a gate trained anew."""

from pathlib import Path

from transformers import set_seed
from transformers.utils import logging

from experiments.baseline_runs import (
    EXAMPLES,
    Fusions,
    check_gate,
    examples_of,
    folder_of,
    load,
    loss_of,
    specialists_of,
)
from trainers import GateStageConfig
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.quickstart.corpora import DOMAINS


MOVED = "math"


def edit(
    seed: int,
    work: Path,
    *,
    base: dict,
    specialist: dict,
    gate: str,
    fusion: str,
    stage: dict | None,
    again: dict | None,
    examples_per_domain: int,
) -> dict:
    """Adds a specialist to a fused model of two, and removes it from one of three.

    Args:
        seed: As for `rivals`, and so are all others but `again`.
        again: Settings of the further steps of stage one.

    Returns:
        Held-out nats per token by model and domain.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, _ = specialists_of(seed, folder, base, specialist)
        data = {d: blocks[d]["fuse"] for d in DOMAINS}
        three = Fusions(folder, tokenizer, data, examples_per_domain, seed)
        two = Fusions(folder, tokenizer, {d: x for d, x in data.items() if d != MOVED}, examples_per_domain, seed)
        tests = {d: examples_of(blocks[d]["held_out"][:EXAMPLES], tokenizer) for d in DOMAINS}
        whole, pair = (load(fusions.gate(gate, fusion, stage)) for fusions in (three, two))
        added, removed = add_specialist(pair, MOVED, folder / MOVED), remove_specialist(whole, MOVED)
        models = {"three": whole, "two": pair, "added": added, "removed": removed}
        found = {name: _losses(model, tests) for name, model in models.items()}
        for name, model, fusions in (("added", added, three), ("removed", removed, two)) if again else ():
            set_seed(seed)
            fusions.train(model, again)
            found[f"{name}, trained again"] = _losses(model, tests)
    return {"nats_per_token": found}


def _losses(model, tests: dict) -> dict[str, float]:
    """Averages over the domains that the model has a specialist for."""
    return {d: loss_of(model, tests[d]) for d in model.config.specialist_names}


def check(*, again: dict | None, **gate) -> None:
    """Checks that the gate exists, with settings that stage one takes."""
    check_gate(**gate)
    GateStageConfig("nowhere", bf16=False, **(again or {}))


RUNS = {"edits": edit}
CHECKS = {"edits": check}
