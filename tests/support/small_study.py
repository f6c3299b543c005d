"""A stand-in for the study's work folder: a tiny base, adapters of it, and a few questions of every kind."""

from pathlib import Path
from random import Random

from experiments.real import coding, instructions, worked_arithmetic
from experiments.real.dataset import programmed, row, worked, write, written
from experiments.real.splitting import draw
from tests.support import adapted


MATERIALS = {
    "base": "base",
    "adapters": {"math": "math", "code": "code"},
    "data": "data",
    "packages": "cache",
    "gate_rows": 3,
    "loss_rows": 2,
    "batch": 2,
}
QUESTIONS = {"products": 3, "school trained": 2, "tasks": 1, "HumanEval": 0, "constraints": 0, "mixed": 2}
STAGE = {"max_steps": 2, "examples_per_domain": 2}
FUSED = {"make": "fused", "gate": "cross:8+calibration", "fusion": "logits", "stage": STAGE}
JOINT = {"max_steps": 3, "examples_per_domain": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def make(work: Path) -> Path:
    """Writes everything that the study needs."""
    adapted.make(work)
    data = work / "data"
    sums = [row("sums", f"{i}+{i}?", f"Answer: {2 * i}") | {"answer": str(2 * i)} for i in range(4)]
    for part in ("trained", "harder", "never-trained"):
        write(data / f"school-{part}.jsonl", sums)
    write(data / "arithmetic-held-out.jsonl", list(map(worked, worked_arithmetic.held_out_items(0, 3))))
    write(data / "tasks-held-out.jsonl", list(map(written, coding.held_out_tasks(0, 4))))
    write(data / "functions-held-out.jsonl", list(map(written, coding.held_out_tasks(1, 4))))
    write(data / "instructions-held-out.jsonl", instructions.instructions(0, 6))
    for name, wanted in (("prose", False), ("prose-held-out", True)):
        write(data / f"{name}.jsonl", [{"question": q} for q in instructions.prose_questions(0, 4, wanted)])
    for name, wanted in (("mixed", False), ("mixed-held-out", True)):
        random = Random(name)
        write(
            data / f"{name}.jsonl",
            [programmed(draw(worked_arithmetic.word_problem, random, wanted)) for _ in range(4)],
        )
    for name in ("math", "math-gate"):
        write(data / f"{name}.jsonl", list(map(worked, worked_arithmetic.training_items(0, 8))))
    for name in ("code", "code-gate"):
        write(data / f"{name}.jsonl", list(map(written, coding.training_tasks(0, 8))))
    return work
