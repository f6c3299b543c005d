"""Lists questions of every kind that a model is measured on, each with a check of its answers."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.real import instructions, scoring


class Part(NamedTuple):
    """Questions whose answers code can check.

    Attributes:
        domain: Whose specialist is the right one.
        longest: New tokens of an answer, at most.
        rows: From the folders of data and of unpacked packages to rows with `kind`.
        question: From a row to what the user says.
        check: From a row and a reply to what is right about it; the first value is what counts.
    """

    domain: str
    longest: int
    rows: Callable[[Path, Path], list[dict]]
    question: Callable[[dict], str]
    check: Callable[[dict, str], dict[str, bool]]


def read(path: Path) -> list[dict]:
    """Reads a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_of_each_kind(rows: list[dict], count: int | None) -> list[dict]:
    """Takes the first rows of each kind, in their order; all of them if `count` is None."""
    kept, counts = [], defaultdict(int)
    for row in rows:
        counts[row["kind"]] += 1
        if count is None or counts[row["kind"]] <= count:
            kept.append(row)
    return kept


def file(name: str, kinds: Callable[[str], bool] = lambda kind: True):
    """Makes a reader of a data file's rows whose kind is wanted."""
    return lambda data, cache: [row for row in read(data / f"{name}.jsonl") if kinds(row["kind"])]


def said(row: dict) -> str:
    """Returns the user's first message."""
    return row["messages"][0]["content"]


def exact(row: dict, reply: str) -> dict[str, bool]:
    """Tells whether the reply gives the number."""
    return {"right": scoring.exact(reply, row["answer"])}


def tests(row: dict, reply: str) -> dict[str, bool]:
    """Tells whether the reply's function passes its tests."""
    return {"right": scoring.passes(reply, row["tests"])}


def both(row: dict, reply: str) -> dict[str, bool]:
    """Tells whether the reply's program passes, whether it gives the number, and whether both hold."""
    program, number = scoring.passes(reply, row["tests"]), scoring.exact(reply, row["answer"])
    return {"right": program and number, "program": program, "number": number}


def problems(data: Path, cache: Path) -> list[dict]:
    """Reads HumanEval's problems as rows."""
    suite = scoring.HumanEval(cache)
    asked = zip(suite.problems, suite.questions(), strict=True)
    return [{"kind": "HumanEval", "problem": problem, "question": question} for problem, question in asked]


def solved(row: dict, reply: str) -> dict[str, bool]:
    """Tells whether the reply's function passes the problem's tests."""
    return {"right": scoring.HumanEval.solved(row["problem"], reply)}


def formed(row: dict, reply: str) -> dict[str, bool]:
    """Tells whether the reply has the form that was asked for."""
    return {"right": instructions.kept(row, reply)}


PARTS = {
    "products": Part("math", 110, file("arithmetic-held-out", lambda kind: kind == "product"), said, exact),
    "arithmetic": Part("math", 110, file("arithmetic-held-out", lambda kind: kind != "product"), said, exact),
    "school trained": Part("math", 64, file("school-trained"), said, exact),
    "school harder": Part("math", 64, file("school-harder"), said, exact),
    "school never trained": Part("math", 64, file("school-never-trained"), said, exact),
    "tasks": Part("code", 160, file("tasks-held-out"), said, tests),
    "HumanEval": Part("code", 256, problems, lambda row: row["question"], solved),
    "constraints": Part("text", 128, file("instructions-held-out"), lambda row: row["question"], formed),
    "mixed": Part("both", 200, file("mixed-held-out"), said, both),
}
