"""Prints the headline of each result file: one line for each benchmark, ours beside what it is measured against."""

import json
from pathlib import Path


def table(results: Path) -> str:
    """Markdown of all that has a result.

    Args:
        results: Folder of the result files.
    """
    lines = ["|  | measured | against | command |", "|---|---:|---|---|"]
    for name, rows in LINES.items():
        file = results / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            lines += [f"| {what} | {read(found)} | {beside} | `benchmarks.{name}` |" for what, beside, read in rows]
    return "\n".join(lines)


def _row(found: dict, **wanted) -> dict:
    [row] = (r for r in found["rows"] if all(r.get(key) == value for key, value in wanted.items()))
    return row


def _median(*path: str):
    def read(found: dict) -> str:
        for key in path:
            found = found[key]
        return "{median:.2f} ({least:.2f} to {most:.2f})".format(**found)

    return read


def _share(field: str, **wanted):
    return lambda found: f"{100 * _row(found, **wanted)[field]:.1f} %"


def _times(field: str, **wanted):
    return lambda found: f"{_row(found, **wanted)[field]:.2f}"


PASSES = "passes per token, quickstart's models"
ONE, LOOP = "one specialist", "a loop that adds logits"
SERIAL = {"way": "one at a time, layer checkpointing"}
CHUNKED = {"fusion": "logits", "stage": "joint", "way": "chunked"}
DEFAULT, EVIDENCE = "cross:128+calibration", "evidence:128+calibration"
# benchmark to what it measured, what against, and how its result file says so
LINES = {
    "decoding": [
        ("a token of three small specialists, stacked", ONE, _median("step, small", "fused, stacked")),
        ("the same, compiled", ONE, _median("step, small", "fused, stacked, compiled")),
        (
            "texts by the quickstart's models, stacked",
            ONE,
            _median("end to end, quickstart's models", "fused, stacked"),
        ),
        ("the same, compiled", ONE, _median("end to end, quickstart's models", "fused, stacked, compiled")),
        (
            "specialists' passes for a token, self-drafting",
            "3 without",
            lambda found: f"{found[PASSES]['self-drafting']['passes']:.2f}",
        ),
        ("a prompt of 128 tokens, 81M each", ONE, _median("prompt, large", "fused, last position")),
    ],
    "adapters": [
        (
            "a token of three adapters on one base, 81M",
            ONE,
            _median("ways", "three adapters on one base, fused", "step"),
        ),
    ],
    "head_losses": [
        ("memory of the loss and its gradients, vocabulary of 32,000", LOOP, _times("peak", **CHUNKED)),
        ("its time", LOOP, _times("time", **CHUNKED)),
    ],
    "cached_epoch": [
        (
            f"an epoch of stage one from a cache, {what}, 100M each",
            "specialists that run",
            _share("epoch", shape="100M", fusion=fusion, way=way),
        )
        for what, fusion, way in (
            ("probabilities", "probabilities", "cached: log_probs"),
            ("logits, exact", "logits", "cached: hidden"),
            ("logits, likeliest tokens", "logits", "cached: top"),
        )
    ],
    "gate_costs": [
        ("a token under the default gate, 36M each", "the paper's gate", _median("rows", DEFAULT, "token")),
        ("a token under a gate that looks back", "the paper's gate", _median("rows", EVIDENCE, "token")),
    ],
    "stage_two": [
        ("memory of a step, one specialist at a time", "all at once", _times("peak", **SERIAL)),
        ("its time", "all at once", _times("time", **SERIAL)),
    ],
    "loading": [
        (
            "time to load a fused folder of three",
            "three models",
            _times("cpu_ratio", way="fused folder", tied=False),
        ),
        ("memory of its own", "the weights", _share("private", way="fused folder", tied=False)),
    ],
    "serving": [
        (f"tokens a second of 16 texts in vLLM, {size}", "transformers", _median(name, "16", "fused, vLLM"))
        for name, size in (("quickstart", "the quickstart's models"), ("random", "29M each"))
    ],
}
