"""Measures routers: the specialist that one chooses alone, and its weights as a prior on the gate."""

from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from experiments.baseline_runs import (
    EXAMPLES,
    Fusions,
    check_gate,
    examples_of,
    folder_of,
    load,
    loss_of,
    mixed,
    specialists_of,
)
from ultrafuser.evaluation.baselines import select
from ultrafuser.evaluation.contenders import best_per_domain
from ultrafuser.evaluation.measurement import MIXED, HeldOut, Scores, score
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.route import ROUTERS
from ultrafuser.route.router_base import Examples, Router
from ultrafuser.route.router_files import router_named
from ultrafuser.route.router_training import measured, prompts_of


def route(
    seed: int,
    work: Path,
    *,
    base: dict,
    specialist: dict,
    gate: str,
    fusion: str,
    stage: dict,
    kinds: list[str],
    examples_per_domain: int,
) -> dict:
    """Trains routers on a part of the text to fuse with, and measures them on held-out text.

    Args:
        seed: As for `rivals`, and so are all others but `kinds`.
        kinds: Names of routers, with their settings.

    Returns:
        Nats per token by row and domain, and the share of each domain's prompts that go to its specialist.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, _ = specialists_of(seed, folder, base, specialist)
        fusions = Fusions(folder, tokenizer, {d: blocks[d]["fuse"] for d in DOMAINS}, examples_per_domain, seed)
        model = load(fusions.gate(gate, fusion, stage)).eval()
    with torch.no_grad():
        tests = {d: examples_of(blocks[d]["held_out"][:EXAMPLES], tokenizer) for d in DOMAINS}
        tests[MIXED] = examples_of(mixed({d: blocks[d]["held_out"] for d in DOMAINS}, seed, EXAMPLES), tokenizer)
        known = {d: examples_of(blocks[d]["fuse"][:EXAMPLES], tokenizer) for d in DOMAINS}
        examples = measured(model, tokenizer, known)
        alone = {d: {n: score(model.specialist(n), x) for n in DOMAINS} for d, x in tests.items()}
        found = {"fused": {d: loss_of(model, x) for d, x in tests.items()}}
        found["oracle"] = {d: _loss(select(alone[d], best_per_domain(alone[d], x)), x) for d, x in tests.items()}
        right = {}
        for kind in kinds:
            router = _made(kind, examples)
            prior = {d: _prior(router, model, tokenizer, x) for d, x in tests.items()}
            chosen = {d: q.argmax(-1) for d, q in prior.items()}
            found[f"{kind}, alone"] = {d: _loss(select(alone[d], chosen[d]), x) for d, x in tests.items()}
            found[f"{kind}, prior"] = {
                d: _loss(score(model, x, before=lambda rows, q=prior[d]: {"gate_prior": q[rows]}), x)
                for d, x in tests.items()
            }
            right[kind] = {d: (chosen[d] == k).float().mean().item() for k, d in enumerate(DOMAINS)}
    return {"nats_per_token": found, "right": right}


def _made(kind: str, examples: Examples) -> Router:
    trains = ROUTERS[kind.partition(":")[0]].trains
    cls, settings = router_named(kind, trained=trains)
    return cls.trained(examples, settings) if trains else cls(settings)


def _prior(router: Router, model, tokenizer, data: HeldOut) -> Tensor:
    return torch.cat([router.prior(batch) for batch in prompts_of(model, tokenizer, data)])


def _loss(scores: Scores, data: HeldOut) -> float:
    return scores.losses[data.scored].mean().item()


def check(*, kinds: list[str], **gate) -> None:
    """Checks that the gate exists, with settings that stage one takes, and the routers."""
    check_gate(**gate)
    for kind in kinds:
        name = kind.partition(":")[0]
        router_named(kind, trained=name in ROUTERS and ROUTERS[name].trains)


RUNS = {"routers": route}
CHECKS = {"routers": check}
