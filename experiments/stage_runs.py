"""Trains fused models: the experiments on stages, mixes and learning rates are one run under other settings.

Specialists, tokenizer and data are the quickstart's. They are made once per seed and shared by all runs.
"""

import os
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from ultrafuser.provenance import digest
from ultrafuser.quickstart.corpora import DOMAINS, documents, splits
from ultrafuser.quickstart.toy import measure_losses
from ultrafuser.quickstart.toy_models import LENGTH, Schedule, make_specialist, to_blocks, train_tokenizer


# what the paper's stage one does without, unless a config says otherwise
PAPER = {"weight_decay": 0.0, "gate_dropout": 0.0, "mixed_share": 0.0}
STAGES = {"start": GateStageConfig, "gate": GateStageConfig, "joint": JointStageConfig}


def train(
    seed: int,
    work: Path,
    *,
    specialists: dict,
    shares: dict[str, float],
    examples_per_domain: int,
    start: dict | None = None,
    gate: dict | None = None,
    joint: dict | None = None,
) -> dict:
    """Trains a fused model and measures it.

    Args:
        seed: Of corpora, tokenizer, specialists, gate and draws.
        work: Folder for what runs share.
        specialists: Steps and rate of their training, as in the quickstart's `Schedule`.
        shares: How much of each domain's data there is to fuse with.
        examples_per_domain: In every batch of every stage.
        start: Settings of a stage one that comes before all that is tried out and is not timed.
        gate: Settings of stage one; None leaves it out.
        joint: Settings of stage two; None leaves it out.

    Returns:
        Held-out nats per token by domain, before and after the stages that are tried out, and their seconds of
        processor time, which other jobs do not change much. With a stage two also its mix over time.
    """
    logging.disable_progress_bar()
    folder = prepared(seed, work, specialists)
    blocks = torch.load(folder / "blocks.pt")
    held_out = {d: blocks[d]["held_out"] for d in DOMAINS}
    kept = {d: blocks[d]["fuse"][: round(shares[d] * len(blocks[d]["fuse"]))].tolist() for d in DOMAINS}
    data = {d: Dataset.from_dict({"input_ids": ids, "labels": ids}) for d, ids in kept.items()}
    set_seed(seed)
    model = UltraFuserForCausalLM.from_specialists({d: folder / d for d in DOMAINS}, gate="mlp")

    def stage(trainer_class, settings: dict) -> GateTrainer | JointTrainer:
        arguments = arguments_of(trainer_class.config_class, examples_per_domain, settings, folder, seed)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        trainer = trainer_class(model, arguments, data, processing_class=tokenizer)
        trainer.train()
        return trainer

    if start:
        # the same for many runs, so it is trained by the first of them
        file = folder / f"start-{digest([shares, examples_per_domain, start])}.pt"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                stage(GateTrainer, start)
                torch.save(model.model.fusion_gate.state_dict(), f"{file}.partial")
                os.replace(f"{file}.partial", file)
        model.model.fusion_gate.load_state_dict(torch.load(file))
    found = {"before": measure_losses(model, held_out)}
    began = time.process_time()
    if gate:
        stage(GateTrainer, gate)
    if joint:
        trainer = stage(JointTrainer, joint)
        found["mixes"] = [(0, trainer.prior.tolist())] if trainer.controller is None else trainer.controller.mixes
        found["domains"] = trainer.domains
        found["drawn"] = trainer.sampler.counts(joint["max_steps"]).tolist()
    seconds = time.process_time() - began
    return {"seconds": seconds, "nats_per_token": measure_losses(model, held_out), **found}


def prepared(seed: int, work: Path, specialists: dict) -> Path:
    """The folder of a seed's tokenizer, specialists and blocks of data, made unless it is there."""
    folder = work / f"specialists-{digest(specialists)}-{seed}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = work / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            parts = {d: splits(documents(d, seed)) for d in DOMAINS}
            tokenizer = train_tokenizer([text for part in parts.values() for text in part["specialist"]])
            blocks = {d: {name: to_blocks(texts, tokenizer) for name, texts in parts[d].items()} for d in DOMAINS}
            for d in DOMAINS:
                make_specialist(blocks[d]["specialist"], tokenizer, partial / d, Schedule(**specialists), seed)
            tokenizer.save_pretrained(partial / "tokenizer")
            torch.save(blocks, partial / "blocks.pt")
            partial.rename(folder)
    return folder


def arguments_of(config_class, examples_per_domain: int, settings: dict, folder: Path, seed: int):
    """Arguments of a stage, from the config's settings and what keeps a run quiet and on the processor."""
    size = {"per_device_train_batch_size": examples_per_domain * len(DOMAINS), "max_length": LENGTH}
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": seed, **PAPER}
    shared = {"examples_per_domain": examples_per_domain, **size, **quiet, **plain}
    return config_class(str(folder / "stage"), **{**shared, **settings})


def check(*, specialists: dict, shares: dict, examples_per_domain: int, **stages: dict | None) -> None:
    """Checks that the settings of specialists and stages exist, and that every domain has its share."""
    Schedule(**specialists)
    if set(shares) != set(DOMAINS):
        raise ValueError(f"`shares` must say how much there is of each of {list(DOMAINS)}, but has {list(shares)}.")
    for name, settings in stages.items():
        if settings:
            arguments_of(STAGES[name], examples_per_domain, settings, Path("nowhere"), seed=0)


RUNS = dict.fromkeys(("stages", "mixes", "rates"), train)
CHECKS = dict.fromkeys(RUNS, check)
