"""Measures how the cost of a fused model grows: `python -m benchmarks.growth`.

One thing is varied at a time: the number of specialists, the rows of a batch, the length of the text before, and the
vocabulary. Each number is a fused model's time over one specialist's under the same conditions, as ordinary and as
stacked; N times is what running N models costs. Weights are random, in two shapes: one bound by the number of
operations, one by reading the weights (29 million each). Times are process CPU seconds of one thread, of reading the
prompt and of each token after it; all models take turns, and both fused ones must say the same. Writes
`results/growth.json`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.decoding import SHAPES, check_alike
from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from ultrafuser.decoding.stacking import stack
from ultrafuser.provenance import provenance


RESULTS = Path(__file__).parent.parent / "results" / "growth.json"
STEPS = 8
REGIMES = {
    "small": SHAPES["small"],
    "large": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "vocab_size": 8192,
    },
}
# what is not varied
USUAL = {"specialists": 3, "batch": 1, "context": 32}
VARIED = {
    "specialists": (2, 3, 4, 6, 8),
    "batch": (1, 4, 16, 32),
    "context": (32, 128, 512, 1024),
    "vocabulary": (1024, 8192, 32768, 131072),
}


def main() -> None:
    """Measures, prints and writes every point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    set_seed(0)
    result = {"provenance": provenance(), "rounds": options.rounds, "shapes": REGIMES, "usual": USUAL}
    for regime, shape in REGIMES.items():
        result[regime] = {}
        for what, values in VARIED.items():
            result[regime][what] = {
                str(value): measure_growth(shape, options.rounds, **{what: value}) for value in values
            }
            print(f"\n{regime}\n\n{table(what, result[regime][what])}", flush=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure_growth(
    shape: dict[str, int],
    rounds: int,
    specialists: int = USUAL["specialists"],
    batch: int = USUAL["batch"],
    context: int = USUAL["context"],
    vocabulary: int | None = None,
) -> dict[str, dict]:
    """Both ways of one point, relative to one specialist."""
    own = LlamaConfig(**shape | {"vocab_size": vocabulary or shape["vocab_size"]})
    names = [f"s{k}" for k in range(specialists)]
    fused = UltraFuserForCausalLM(UltraFuserConfig(specialist_names=names, specialists=[own] * specialists)).eval()
    # a model of its own: a fused model's specialist reads its part of the wide head, which is slower
    models = {"one specialist": LlamaForCausalLM(own).eval(), "fused": fused, "fused, stacked": stack(fused)}
    ids = torch.randint(3, own.vocab_size, (batch, context + STEPS))
    said = {name: model(ids, logits_to_keep=1).logits for name, model in models.items()}
    check_alike(said["fused"], said["fused, stacked"])
    return compare_ways({name: lambda model=model: seconds(model, ids) for name, model in models.items()}, rounds)


def seconds(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """Process CPU seconds of the prompt up to its last position, and of each token after that."""
    start, context = time.process_time(), ids.shape[1] - STEPS
    cache = model(ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
    read = time.process_time()
    for i in range(context, ids.shape[1]):
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    return {"prompt": read - start, "token": (time.process_time() - read) / STEPS}


def table(what: str, points: dict[str, dict]) -> str:
    """Markdown of one thing that was varied."""
    ways = [(way, quantity) for quantity in ("token", "prompt") for way in ("fused", "fused, stacked")]
    heads = [what, *(f"{quantity}: {way}" for way, quantity in ways)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for value, found in points.items():
        cells = ["{median:.2f} ({least:.2f} to {most:.2f})".format(**found[way][quantity]) for way, quantity in ways]
        lines.append(f"| {' | '.join([value, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
