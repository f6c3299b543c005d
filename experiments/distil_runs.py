"""Can one model of a specialist's size learn what the fused model knows? Teachers, and no teacher, under the same steps.

Specialists, their base and the fused model are those of `experiments/baselines`, tuned from one base. Students read the same
blocks in the same order: the text that gates are trained on, which no specialist has seen.
"""

import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock
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
    mixed,
    rows_of,
    specialists_of,
)
from trainers.distil_config import DistilConfig
from trainers.distil_trainer import DistilTrainer
from ultrafuser.evaluation.comparison import MIXED
from ultrafuser.provenance import digest
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.quickstart.toy_models import LENGTH


QUIET = {"logging_strategy": "no", "save_strategy": "steps", "report_to": "none", "disable_tqdm": True}
PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_total_limit": 1, "max_length": LENGTH}


def distil(
    seed: int,
    work: Path,
    *,
    base: dict,
    specialist: dict,
    teachers: dict[str, dict],
    teacher: str,
    student: str,
    stage: dict[str, Any],
) -> dict:
    """Distils one student, and measures it, its start and its teacher.

    Args:
        seed: Of corpora, tokenizer, first weights and draws.
        work: Folder for models. A run that was killed goes on from its last checkpoint there.
        base: Steps and rate of the base, as `rivals` takes them; so is `specialist`.
        teachers: Fused models by name, as `Fusions.gate` takes them.
        teacher: A name of `teachers`.
        student: "base", or the specialist that the student begins as.
        stage: Settings of the distillation.

    Returns:
        Nats per token by domain and on mixed items, of the student, its start and its teacher.
    """
    logging.disable_progress_bar()
    folder, lock = folder_of(seed, work, base, specialist)
    with lock:
        blocks, tokenizer, _ = specialists_of(seed, folder, base, specialist)
        data = {d: blocks[d]["fuse"] for d in DOMAINS}
        source = Fusions(folder, tokenizer, data, 4, seed).gate(**teachers[teacher])
    tests = {d: examples_of(blocks[d]["held_out"][:EXAMPLES], tokenizer) for d in DOMAINS}
    tests[MIXED] = examples_of(mixed({d: blocks[d]["held_out"] for d in DOMAINS}, seed, EXAMPLES), tokenizer)
    out = folder / f"distilled {digest([teachers[teacher], student, stage])}"
    with FileLock(f"{out}.lock"):
        set_seed(seed)
        model, taught = load(folder / student), load(source)
        before = {d: loss_of(model, x) for d, x in tests.items()}
        arguments = DistilConfig(str(out), seed=seed, **QUIET, **PLAIN, **stage)
        trainer = DistilTrainer(model, taught, arguments, rows_of(data), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*/trainer_state.json")) or None)
        found = {d: loss_of(trainer.model, x) for d, x in tests.items()}
        shutil.rmtree(out)
    its = {d: loss_of(taught, x) for d, x in tests.items()}
    return {"nats_per_token": found, "before": before, "teacher": its}


def check(*, teachers: dict[str, dict], teacher: str, student: str, stage: dict[str, Any], **_) -> None:
    """Checks that teacher and student exist, with settings that the distillation takes."""
    if teacher not in teachers or student not in ("base", *DOMAINS):
        raise ValueError(
            f"`teacher` is one of {list(teachers)}, `student` 'base' or a domain: {teacher!r}, {student!r}."
        )
    for how in teachers.values():
        check_gate(**how)
    DistilConfig("nowhere", **QUIET, **PLAIN, **stage)


RUNS = {"distil": distil}
CHECKS = {"distil": check}
