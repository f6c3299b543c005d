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

from experiments.real.generating import answers
from experiments.real.packing import shared_start, tokenised
from experiments.real.parts import PARTS, Part, first_of_each_kind, read


LOSSES = {  # name of the measure: file
    "math": "arithmetic-held-out",
    "code": "tasks-held-out",
    "functions": "functions-held-out",
    "text": "prose-held-out-answered",
    "mixed": "mixed-held-out",
}
ALL = [*PARTS, "losses"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, fused or not")
    parser.add_argument("--adapter", help="folder of a LoRA adapter")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parts", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--first", type=int, default=None, help="questions of each kind, at most")
    options = parser.parse_args()
    model, tokenizer = loaded(options.model, options.adapter)
    done = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        if part in done:
            continue
        began = time.process_time()
        measure = losses if part == "losses" else share(PARTS[part])
        done[part] = measure(model, tokenizer, options) | {"seconds": round(time.process_time() - began)}
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


def share(part: Part):
    """Makes a measure: how many answers are right, in all and of each kind, with the replies."""

    def measure(model, tokenizer, options) -> dict:
        rows = first_of_each_kind(part.rows(options.data, options.cache), options.first)
        replies = answers(model, tokenizer, [part.question(row) for row in rows], part.longest)
        checks = [part.check(row, reply) for row, reply in zip(rows, replies, strict=True)]
        return {**counted([row["kind"] for row in rows], checks), "replies": replies}

    return measure


def counted(kinds: list[str], checks: list[dict[str, bool]]) -> dict:
    """Counts answers that are right, in all and by kind, and what else was checked."""
    each = defaultdict(list)
    for kind, check in zip(kinds, checks, strict=True):
        each[kind].append(next(iter(check.values())))
    totals = {name: sum(check[name] for check in checks) for name in checks[0]}
    return {**totals, "of": len(checks), "kinds": {kind: [sum(goods), len(goods)] for kind, goods in each.items()}}


def losses(model, tokenizer, options) -> dict:
    """Nats per token of the held-out answers of each domain."""
    measured = {}
    for name, file in LOSSES.items():
        if (path := options.data / f"{file}.jsonl").exists():
            rows = first_of_each_kind(read(path), options.first)
            sums, counts = zip(*example_losses(model, tokenizer, rows), strict=True)
            measured[name] = {"nats": round(sum(sums) / sum(counts), 4), "tokens": sum(counts)}
    return measured


@torch.inference_mode()
def example_losses(model, tokenizer, rows: list[dict], *, prompts: bool = False) -> list[tuple[float, int]]:
    """Returns summed loss in nats and number of tokens of each row's answer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Conversations of one question.
        prompts: Whether to score the question instead, behind the beginning that all conversations share.
    """
    start, found = shared_start(tokenizer), []
    for row in rows:
        example = tokenised(tokenizer, row["messages"], len(start))
        answer = sum(label >= 0 for label in example.labels)
        ids = torch.tensor([start + (example.ids[: len(example.ids) - answer] if prompts else example.ids)])
        count = len(example.ids) - answer if prompts else answer
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, -count:], reduction="sum")
        found.append((loss.item(), count))
    return found


if __name__ == "__main__":
    main()
