"""Materials of `quickstart --real`: LoRA adapters, conversations to fit the gate on and to measure with, prompts."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..evaluation.measurement import HeldOut, held_out


HERE = Path(__file__).parent
GATE_ROWS, HELD_OUT_ROWS = HERE / "conversations" / "gate.jsonl", HERE / "conversations" / "held_out.jsonl"
PROMPTS = {
    "text": "Explain in two sentences why we sleep.",
    "math": "What is 47*46?",
    "code": "Write a Python function `solve(numbers)` that returns the sum of the squares of the even numbers in a list.",
    "both": (
        "A box holds 24 pens. How many pens are in 17 boxes? First write a Python function `solve()` that returns the "
        "number, then work it out."
    ),
}


@dataclass
class Materials:
    """Adapters, conversations and prompts, to go with a base.

    Attributes:
        adapters: LoRA adapters of the base, by name. The base itself is the specialist "text".
        gate_rows: JSON lines of conversations with their `domain`, to fit the gate on.
        held_out_rows: The same, to measure with.
        prompts: To answer at the end, by what they need.
        new_tokens: Of an answer, at most.
    """

    adapters: dict[str, Path] = field(default_factory=lambda: {n: HERE / "specialists" / n for n in ("math", "code")})
    gate_rows: Path = GATE_ROWS
    held_out_rows: Path = HELD_OUT_ROWS
    prompts: dict[str, str] = field(default_factory=lambda: dict(PROMPTS))
    new_tokens: int = 128

    def specialists(self, base: str) -> dict[str, str]:
        """Names the specialists of a base."""
        return {"text": base, **{name: str(folder) for name, folder in self.adapters.items()}}


def by_domain(path: Path) -> dict[str, list[dict]]:
    """Reads conversations by domain, in the order of the file, as prompts and completions: answers alone are learned."""
    found: dict[str, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        found.setdefault(row["domain"], []).append(turns)
    return found


def held_out_by_domain(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, HeldOut]:
    """Makes examples of conversations to measure with, by domain."""
    return {domain: held_out(rows, tokenizer) for domain, rows in by_domain(path).items()}
