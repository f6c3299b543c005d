"""Lets the base answer the prose questions: the gate's text domain, and held-out text to measure on.

python -m experiments.real.answering --base base --data data
"""

import argparse
import json
from pathlib import Path

from experiments.real.dataset import row, write
from experiments.real.generating import answers
from experiments.real.measuring import loaded


LONGEST = 96  # tokens of an answer


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, type=Path)
    options = parser.parse_args()
    model, tokenizer = loaded(options.base, None)
    for name in ("prose", "prose-held-out"):
        target = options.data / f"{name}-answered.jsonl"
        if target.exists():
            continue
        questions = [
            json.loads(line)["question"] for line in (options.data / f"{name}.jsonl").read_text().splitlines()
        ]
        replies = answers(model, tokenizer, questions, LONGEST)
        write(target, [row("prose", q, a) for q, a in zip(questions, replies, strict=True)])


if __name__ == "__main__":
    main()
