"""Time and peak memory of the loss, from hidden states to gradients, in chunks and otherwise: `python benchmarks/head_losses.py`.

Three specialists' last hidden states, a gate's weights and heads, all random, in float32 on the CPU with one thread.
"loop" is what one would write with care: one specialist's logits after another into one sum, then cross-entropy. Every
way gives loss, gradients of hidden states (or, with a frozen head, of the gate weights alone) and of the head; ours and
TRL's also entropies and hits, which trainers log. All ways of a rule run in turns in one process, and are divided by the
loop of the same round: processor time, median of the rounds and their range. Peak memory is what the process held at
most beyond what it held just before. Writes `results/head_losses.json`.
"""

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from benchmarks.timing import held, ratios, take_turns
from trainers.heads import head_of
from ultrafuser.provenance import provenance


ROOT = Path(__file__).parent.parent
SPECIALISTS = 3


def main() -> None:
    """Measures every way of both rules, with the head trained and frozen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "head_losses.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for fusion, ways in WAYS.items():
        for stage in ("joint", "gate"):
            rows += compare_losses(fusion, stage, ways, options)
    shape = {key: getattr(options, key) for key in ("tokens", "hidden", "vocab", "rounds")}
    result = {**provenance(), "shape": {"specialists": SPECIALISTS, **shape}, "rows": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def compare_losses(fusion: str, stage: str, ways: dict[str, Callable], options: argparse.Namespace) -> list[dict]:
    """One row per way."""
    inputs = made(stage, options)
    specialists = [SimpleNamespace(hidden_size=options.hidden)] * SPECIALISTS
    config = SimpleNamespace(fusion=fusion, specialists=specialists, adapters=None)
    runs_of = {name: partial(measure_loss, way, config, stage, inputs) for name, way in ways.items()}
    found = take_turns(runs_of, options.rounds)
    rows = []
    for name, runs in found.items():
        seconds, peaks, losses = zip(*runs, strict=True)
        times = ratios(seconds, [loop[0] for loop in found["loop"]])
        row = {
            "fusion": fusion,
            "stage": stage,
            "way": name,
            "time": round(statistics.median(times), 3),
            "time_range": [round(min(times), 3), round(max(times), 3)],
            "peak": round(statistics.median(peaks) / statistics.median(p for _, p, _ in found["loop"]), 3),
            "seconds": [round(s, 2) for s in seconds],
            "peak_bytes": max(peaks),
            "loss": losses[0],
        }
        if abs(row["loss"] / found["loop"][0][2] - 1) > 1e-5:
            raise AssertionError(f"{name} has the loss {row['loss']}, the loop {found['loop'][0][2]}.")
        print(
            f"{fusion}, {stage}, {name}: {row['time']} of the time {row['time_range']}, {row['peak']} of the peak",
            flush=True,
        )
        rows.append(row)
    return rows


def made(stage: str, options: argparse.Namespace) -> tuple[Tensor, ...]:
    """Hidden states, scores of the gate, head and labels."""
    torch.manual_seed(0)
    width, trained = options.hidden * SPECIALISTS, stage == "joint"
    hidden = torch.randn(options.tokens, width).requires_grad_(trained)
    scores = torch.randn(options.tokens, SPECIALISTS).requires_grad_()
    head = (0.05 * torch.randn(options.vocab, width)).requires_grad_(trained)
    return hidden, scores, head, torch.randint(0, options.vocab, (options.tokens,))


def measure_loss(way: Callable, config, stage: str, inputs: tuple[Tensor, ...]) -> tuple[float, int, float]:
    """Processor seconds, bytes at the peak, and the loss."""
    for tensor in inputs[:3]:
        tensor.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = held("VmRSS"), time.process_time()
    hidden, scores, head, targets = inputs
    loss = way(config, stage, hidden, scores.softmax(-1), head, targets)
    loss.backward()
    return time.process_time() - began, held("VmHWM") - before, loss.item()


def scaled(hidden: Tensor, weights: Tensor) -> Tensor:
    """Returns the output of a backbone that mixes logits."""
    own = zip(hidden.chunk(SPECIALISTS, -1), weights.split(1, -1), strict=True)
    return torch.cat([w * h for h, w in own], -1)


def loop_of_logits(config, stage, hidden, weights, head, targets) -> Tensor:
    """A weighted sum of logits, specialist by specialist."""
    total = 0
    parts = zip(hidden.chunk(SPECIALISTS, -1), head.chunk(SPECIALISTS, -1), weights.split(1, -1), strict=True)
    for h, own, w in parts:
        total = total + w * (h @ own.T)
    return F.cross_entropy(total, targets)


def loop_of_probabilities(config, stage, hidden, weights, head, targets) -> Tensor:
    """The same of probabilities, in logarithms."""
    total = None
    parts = zip(hidden.chunk(SPECIALISTS, -1), head.chunk(SPECIALISTS, -1), weights.split(1, -1), strict=True)
    for h, own, w in parts:
        words = (h @ own.T).log_softmax(-1) + w.log()
        total = words if total is None else torch.logaddexp(total, words)
    return F.nll_loss(total, targets)


def wide_head(config, stage, hidden, weights, head, targets) -> Tensor:
    """One linear layer and cross-entropy over all logits at once."""
    return F.cross_entropy(scaled(hidden, weights) @ head.T, targets)


def trl_kernel(config, stage, hidden, weights, head, targets) -> Tensor:
    """Computes the loss as TRL's trainers do for a model that is one linear head."""
    outputs = ("log_probs", "entropy", "is_top1")
    states = scaled(hidden, weights)
    size = _CHUNKED_LOGPROB_CHUNK_SIZE
    return -_ChunkedLogProbFunction.apply(states, head, None, targets, 1.0, size, None, 1.0, outputs)[0].mean()


def chunked(config, stage, hidden, weights, head, targets) -> Tensor:
    """Computes the loss as the trainers of this package do."""
    own = head_of(config)
    states = own.rule(hidden.chunk(SPECIALISTS, -1), weights)
    return -own.score(states, weights, head, targets, gate_only=stage == "gate")[0].mean()


WAYS = {
    "logits": {"loop": loop_of_logits, "wide head": wide_head, "TRL's kernel": trl_kernel, "chunked": chunked},
    "probabilities": {"loop": loop_of_probabilities, "chunked": chunked},
}


if __name__ == "__main__":
    main()
