"""An epoch of stage one from the cache beside one that runs the specialists: `python benchmarks/cached_epoch.py`.

Three Llamas with random weights, fused, in float32 on the CPU with one thread; random tokens in three domains. Each way
is a trainer's own `train()`, everything that a step does included, on the same draws:

- "naive": specialists without autograd, the model's own loss over all logits;
- "stage": `GateTrainer`;
- "cached": `CachedGateTrainer`, once its one pass over the data is made.

Ways run in turns in one process; a step's processor time is divided by the naive one's of the same round: median of the
rounds and their range. "pass" is what the one pass costs, in naive epochs. Writes `results/cached_epoch.json`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.timing import ratios
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from trainers import CachedGateTrainer, GateStageConfig, GateTrainer
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.quickstart.toy_models import train_tokenizer


ROOT = Path(__file__).parent.parent
SHAPES = {  # of each specialist
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 1024},
    "100M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 8192},
}
KEPT = {"probabilities": ("log_probs",), "logits": ("hidden", "top")}
LENGTH, PER_DOMAIN, STEPS = 128, 2, 3


class Naive(GateTrainer):
    """The gate learns from the model's own loss, all logits at once."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("domain")
        return model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss


class Clock(TrainerCallback):
    """Processor time of every step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.process_time() - self.began)


def main() -> None:
    """Measures all shapes and rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cached_epoch.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    disable_progress_bars()
    rows = [
        row for shape in options.shapes for fusion in KEPT for row in compare_epochs(shape, fusion, options.rounds)
    ]
    run = {"length": LENGTH, "examples_per_domain": PER_DOMAIN, "steps": STEPS, "rounds": options.rounds}
    options.out.write_text(json.dumps({**provenance(), "shapes": SHAPES, "run": run, "rows": rows}, indent=2) + "\n")


def compare_epochs(shape: str, fusion: str, rounds: int) -> list[dict]:
    """One row per way."""
    ways = {"naive": (Naive, {}), "stage": (GateTrainer, {})}
    found = {name: [] for name in (*ways, *KEPT[fusion])}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for keep in KEPT[fusion]:
                ways[keep] = (CachedGateTrainer, {"cache": Path(folder) / keep, "keep": keep})
            for name, (trainer, more) in ways.items():
                found[name].append(measure_epoch(trainer, shape, fusion, more))
    rows = []
    for name, runs in found.items():
        steps = ratios(*([run["step"] for run in of] for of in (runs, found["naive"])))
        row = {
            "shape": shape,
            "parameters": runs[0]["parameters"],
            "fusion": fusion,
            "way": name if name in ("naive", "stage") else f"cached: {name}",
            "epoch": round(statistics.median(steps), 4),
            "epoch_range": [round(min(steps), 4), round(max(steps), 4)],
            "step_seconds": [round(r["step"], 4) for r in runs],
            "loss": runs[0]["loss"],
            "difference": runs[0]["loss"] - found["naive"][0]["loss"],
        }
        if name not in ("naive", "stage"):
            whole = [own["before"] / (STEPS * naive["step"]) for own, naive in zip(runs, found["naive"], strict=True)]
            row |= {"pass": round(statistics.median(whole), 3), "bytes_per_token": runs[0]["bytes_per_token"]}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def measure_epoch(trainer: type[GateTrainer], shape: str, fusion: str, more: dict) -> dict:
    """Median processor seconds of a step, those before the first one, and the last loss."""
    set_seed(0)
    specialist = LlamaConfig(**SHAPES[shape], num_attention_heads=4, initializer_range=0.05)
    config = UltraFuserConfig(specialist_names=list(DOMAINS), specialists=[specialist] * 3, fusion=fusion)
    model = UltraFuserForCausalLM(config)
    number = STEPS * PER_DOMAIN
    data = {}
    for name in DOMAINS:
        ids = torch.randint(3, SHAPES[shape]["vocab_size"], (number, LENGTH)).tolist()
        data[name] = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        arguments = GateStageConfig(
            folder,
            max_steps=STEPS,
            learning_rate=1e-2,
            per_device_train_batch_size=3 * PER_DOMAIN,
            examples_per_domain=PER_DOMAIN,
            max_length=LENGTH,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        stage = trainer(model, arguments, data, processing_class=train_tokenizer(["speed"], vocab_size=300), **more)
        clock = Clock()
        stage.add_callback(clock)
        stage.remove_callback(PrinterCallback)
        began = time.process_time()
        stage.train()
        before = time.process_time() - began - sum(clock.seconds)
    found = {"step": statistics.median(clock.seconds), "before": before, "parameters": model.num_parameters() // 3}
    found["loss"] = [entry["loss"] for entry in stage.state.log_history if "loss" in entry][-1]
    if more:
        arrays = stage.cache.arrays.values()
        found["bytes_per_token"] = sum(a[0].numel() * a.element_size() for a in arrays)
    return found


if __name__ == "__main__":
    main()
