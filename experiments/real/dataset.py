"""Makes all data from a seed: what each specialist is tuned on, and held-out questions with what checks their answers.

    python -m experiments.real.dataset --out data --seed 0

Code is from the standard library and installed packages, so it differs between machines.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from random import Random

from experiments.real import coding, functions, instructions, worked_arithmetic
from experiments.real.school import School
from experiments.real.splitting import draw


ARITHMETIC, SCHOOL = 14_000, 2_000  # items to tune the mathematics specialist on
TASKS, FUNCTIONS, PROGRAMS = 5_000, 1_500, 800  # and the code specialist
HELD_OUT = 200  # questions of each kind
MIXED = 100
ASK_PROGRAM = [
    "Write a Python function `solve()` that returns the number.",
    "Write a Python function `solve()` that returns the answer.",
    "Implement `solve()` in Python. It returns the number.",
]
GATE = 300  # questions of each domain to train the gate on, drawn anew from the training part


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where fetched packages are kept")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the Mathematics Dataset draws from sets
        command = [sys.executable, "-m", "experiments.real.dataset", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"PYTHONHASHSEED": "0"})
    mathematics(options.out, options.cache, options.seed)
    code(options.out, options.seed)
    prose(options.out, options.seed)
    mixed(options.out, options.seed)
    for_gate(options.out, options.seed)


def mathematics(out: Path, cache: Path, seed: int) -> None:
    """Arithmetic with steps and questions of the Mathematics Dataset, to tune on and held out."""
    school = School(cache)
    items = worked_arithmetic.training_items(seed, ARITHMETIC) + school.training_items(seed, SCHOOL)
    Random(seed).shuffle(items)
    write(out / "math.jsonl", [worked(item) for item in items])
    write(
        out / "arithmetic-held-out.jsonl", [worked(item) for item in worked_arithmetic.held_out_items(seed, HELD_OUT)]
    )
    for part, held_out in school.held_out_items(seed, 20).items():
        write(out / f"school-{part.replace(' ', '-')}.jsonl", [worked(item) for item in held_out])


def code(out: Path, seed: int) -> None:
    """Small functions with tests, documented functions of packages, programs for word problems, to tune on and held out."""
    found = functions.functions()
    packaged = functions.sample(functions.split(found, wanted=False), seed, FUNCTIONS)
    tasks = coding.training_tasks(seed, TASKS) + packaged
    rows = [written(task) for task in tasks] + programs(seed, PROGRAMS)
    Random(seed).shuffle(rows)
    write(out / "code.jsonl", rows)
    write(out / "tasks-held-out.jsonl", [written(task) for task in coding.held_out_tasks(seed, HELD_OUT)])
    rest = functions.sample(functions.split(found, wanted=True), seed, HELD_OUT)
    write(out / "functions-held-out.jsonl", [written(task) for task in rest])


def prose(out: Path, seed: int) -> None:
    """Questions that ask for prose, without answers, and instructions whose form can be checked."""
    for name, count, wanted in (("prose", GATE, False), ("prose-held-out", HELD_OUT, True)):
        rows = [{"question": question} for question in instructions.prose_questions(seed, count, wanted)]
        write(out / f"{name}.jsonl", rows)
    write(out / "instructions-held-out.jsonl", instructions.instructions(seed, HELD_OUT))


def mixed(out: Path, seed: int) -> None:
    """Answers of two domains: a word problem, a function that solves it, and the number worked out."""
    for name, wanted in (("mixed", False), ("mixed-held-out", True)):
        random = Random(f"mixed {seed} {wanted}")
        items = [draw(worked_arithmetic.word_problem, random, wanted) for _ in range(MIXED)]
        write(out / f"{name}.jsonl", [programmed(item) for item in items])


def for_gate(out: Path, seed: int) -> None:
    """Items of mathematics and code that no specialist was tuned on; prose questions get the base's answers later."""
    items, tasks = worked_arithmetic.training_items(seed + 1000, GATE), coding.training_tasks(seed + 1000, GATE)
    write(out / "math-gate.jsonl", [worked(item) for item in items])
    write(out / "code-gate.jsonl", [written(task) for task in tasks])


def worked(item: worked_arithmetic.Item) -> dict:
    """An item of mathematics as a row: what is said, and what checks it."""
    return row(item.kind, item.question, item.steps) | {"answer": item.answer}


def written(task: coding.Task) -> dict:
    """A function to write as a row."""
    return row(task.kind, task.question, f"```python\n{task.code}\n```") | {"tests": task.tests}


def programs(seed: int, count: int) -> list[dict]:
    """Word problems to write a program for, and no number."""
    random = Random(f"programs {seed}")
    items = [draw(worked_arithmetic.word_problem, random, wanted=False) for _ in range(count)]
    return [
        row("program", f"{item.question} {random.choice(ASK_PROGRAM)}", program(item)) | {"tests": tests_of(item)}
        for item in items
    ]


def program(item: worked_arithmetic.Item) -> str:
    """The function that returns a word problem's answer, as a block of code."""
    body = "\n".join(f"    {line}" for line in worked_arithmetic.program_lines(item))
    return f"```python\ndef solve():\n{body}\n```"


def tests_of(item: worked_arithmetic.Item) -> list[str]:
    """Lists the assertions that check a program for a word problem."""
    return [f"assert solve() == {item.answer}"]


def programmed(item: worked_arithmetic.Item) -> dict:
    """A word problem as a row that asks for a program and then the number."""
    question = f"{item.question} First write a Python function `solve()` that returns the number, then work it out."
    reply = f"{program(item)}\n\n{item.steps}"
    return row("mixed", question, reply) | {"answer": item.answer, "tests": tests_of(item)}


def row(kind: str, question: str, reply: str) -> dict:
    """A conversation of one question."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"kind": kind, "messages": messages}


def write(path: Path, rows: list[dict]) -> None:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
