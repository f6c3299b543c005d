"""Compares any number of gates, trained on one cache of the specialists' states.

Specialists, tokenizer and data are the quickstart's, as in `training`. The first run of a fusion rule makes the cache in
the work folder; the others read it.
"""

import time
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from experiments.stage_runs import arguments_of, prepared
from experiments.stage_runs import check as check_training
from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import CachedGateTrainer
from ultrafuser.provenance import digest
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.quickstart.toy import measure_losses


def fit(
    seed: int,
    work: Path,
    *,
    specialists: dict,
    shares: dict[str, float],
    examples_per_domain: int,
    fusion: str,
    gate: dict,
    gate_seed: int,
    stage: dict,
) -> dict:
    """Trains one gate from the cache and measures the fused model.

    Args:
        seed: Of corpora, tokenizer, specialists and draws.
        work: Folder for specialists and caches.
        specialists: Steps and rate of their training, as in the quickstart's `Schedule`.
        shares: How much of each domain's data there is to fuse with.
        examples_per_domain: In every batch.
        fusion: A name in `FUSIONS`.
        gate: Kind and width, as `from_specialists` takes them.
        gate_seed: Of the gate's first weights.
        stage: Settings of stage one.

    Returns:
        Held-out nats per token by domain, the gate's parameters, and seconds of processor time of its training, without
        the pass over the data.
    """
    logging.disable_progress_bar()
    folder = prepared(seed, work, specialists)
    blocks = torch.load(folder / "blocks.pt")
    kept = {d: blocks[d]["fuse"][: round(shares[d] * len(blocks[d]["fuse"]))].tolist() for d in DOMAINS}
    data = {d: Dataset.from_dict({"input_ids": ids, "labels": ids}) for d, ids in kept.items()}
    set_seed(gate_seed)
    model = UltraFuserForCausalLM.from_specialists({d: folder / d for d in DOMAINS}, fusion=fusion, **gate)
    arguments = arguments_of(CachedGateTrainer.config_class, examples_per_domain, stage, folder, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cache = folder / f"cache-{fusion}-{digest(shares)}"
    with FileLock(f"{cache}.lock"):
        trainer = CachedGateTrainer(model, arguments, data, processing_class=tokenizer, cache=cache)
        trainer.fill()
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    held_out = {d: blocks[d]["held_out"] for d in DOMAINS}
    parameters = sum(p.numel() for p in model.model.fusion_gate.parameters())
    return {"seconds": seconds, "parameters": parameters, "nats_per_token": measure_losses(model, held_out)}


def check(*, specialists: dict, shares: dict, examples_per_domain: int, stage: dict, **_) -> None:
    """Checks that the settings of specialists and stage exist."""
    check_training(specialists=specialists, shares=shares, examples_per_domain=examples_per_domain, gate=stage)


RUNS = {"gates": fit}
CHECKS = {"gates": check}
