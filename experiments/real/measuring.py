"""Measures a model: what it solves, in each domain, and its loss on held-out answers.

    python -m experiments.real.measuring --model base --adapter math --data data --out measured/math.json

Goes on where it was killed: every part is kept once it is measured.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.real import instructions, scoring
from experiments.real.generating import answers
from experiments.real.packing import IGNORED, shared_start, tokenised


LOSSES = {  # name of the measure: file
    "math": "arithmetic-held-out",
    "code": "tasks-held-out",
    "functions": "functions-held-out",
    "text": "prose-held-out-answered",
    "mixed": "mixed-held-out",
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, fused or not")
    parser.add_argument("--adapter", help="folder of a LoRA adapter")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--first", type=int, default=None, help="questions of each kind, at most")
    options = parser.parse_args()
    model, tokenizer = loaded(options.model, options.adapter)
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        if part in done:
            continue
        began = time.process_time()
        done[part] = PARTS[part](model, tokenizer, options) | {"seconds": round(time.process_time() - began)}
        print(part, json.dumps({k: v for k, v in done[part].items() if k != "replies"}), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=1, ensure_ascii=False))
        os.replace(partial, options.out)


def loaded(source: str, adapter: str | None):
    """The model, with its adapter merged in if there is one, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=True).eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, tokenizer


def rows(options, name: str) -> list[dict]:
    """Rows of a data file, the first of each kind if fewer are wanted."""
    kept, counts = [], defaultdict(int)
    for line in (options.data / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        counts[row.get("kind")] += 1
        if options.first is None or counts[row.get("kind")] <= options.first:
            kept.append(row)
    return kept


def by_kind(kinds: list[str], right: list[bool], replies: list[str]) -> dict:
    """Share that is right, in all and of each kind, with the replies."""
    each = defaultdict(list)
    for kind, good in zip(kinds, right, strict=True):
        each[kind].append(good)
    shares = {kind: [sum(goods), len(goods)] for kind, goods in each.items()}
    return {"right": sum(right), "of": len(right), "kinds": shares, "replies": replies}


def exact_match(file: str, longest: int, only: str | None = None):
    """A measure of numbers by exact match, of all kinds or one."""

    def measure(model, tokenizer, options) -> dict:
        found = [row for row in rows(options, file) if only in (None, row["kind"])]
        replies = answers(model, tokenizer, [row["messages"][0]["content"] for row in found], longest)
        right = [scoring.exact(reply, row["answer"]) for reply, row in zip(replies, found, strict=True)]
        return by_kind([row["kind"] for row in found], right, replies)

    return measure


def tests_pass(model, tokenizer, options) -> dict:
    """Small functions whose tests run."""
    found = rows(options, "tasks-held-out")
    replies = answers(model, tokenizer, [row["messages"][0]["content"] for row in found], 160)
    right = [scoring.passes(reply, row["tests"]) for reply, row in zip(replies, found, strict=True)]
    return by_kind([row["kind"] for row in found], right, replies)


def mixed(model, tokenizer, options) -> dict:
    """Word problems that need a program and a number: both, and each alone."""
    found = rows(options, "mixed-held-out")
    replies = answers(model, tokenizer, [row["messages"][0]["content"] for row in found], 200)
    runs = [scoring.passes(reply, row["tests"]) for reply, row in zip(replies, found, strict=True)]
    right = [scoring.exact(reply, row["answer"]) for reply, row in zip(replies, found, strict=True)]
    both = [a and b for a, b in zip(runs, right, strict=True)]
    return by_kind(["both"] * len(found), both, replies) | {"program": sum(runs), "number": sum(right)}


def human_eval(model, tokenizer, options) -> dict:
    """HumanEval, pass@1, greedy."""
    suite = scoring.HumanEval(options.cache)
    problems = suite.problems[: options.first]
    replies = answers(model, tokenizer, suite.questions()[: options.first], 256, batch=41)
    right = [suite.solved(problem, reply) for problem, reply in zip(problems, replies, strict=True)]
    return by_kind(["HumanEval"] * len(right), right, replies)


def constraints(model, tokenizer, options) -> dict:
    """Instructions about an answer's form."""
    found = rows(options, "instructions-held-out")
    replies = answers(model, tokenizer, [row["question"] for row in found], 128)
    right = [instructions.kept(row, reply) for row, reply in zip(found, replies, strict=True)]
    return by_kind([row["kind"] for row in found], right, replies)


@torch.no_grad()
def losses(model, tokenizer, options) -> dict:
    """Nats per token of the held-out answers of each domain."""
    start, measured = shared_start(tokenizer), {}
    for name, file in LOSSES.items():
        if not (options.data / f"{file}.jsonl").exists():
            continue
        total = count = 0
        for row in rows(options, file):
            example = tokenised(tokenizer, row["messages"], len(start))
            ids = torch.tensor([start + example.ids])
            targets = torch.tensor([[IGNORED] * len(start) + example.labels])[:, 1:]
            logits = model(input_ids=ids).logits[:, :-1].float()
            learned = targets != IGNORED
            total += torch.nn.functional.cross_entropy(logits[learned], targets[learned], reduction="sum").item()
            count += int(learned.sum())
        measured[name] = {"nats": round(total / count, 4), "tokens": count}
    return measured


PARTS = {
    "products": exact_match("arithmetic-held-out", 110, only="product"),
    "arithmetic": exact_match("arithmetic-held-out", 110),
    "tasks": tests_pass,
    "losses": losses,
    "mixed": mixed,
    "constraints": constraints,
    "HumanEval": human_eval,
    "school trained": exact_match("school-trained", 64),
    "school harder": exact_match("school-harder", 64),
    "school never trained": exact_match("school-never-trained", 64),
}


if __name__ == "__main__":
    main()
