"""Peak memory of stage one against the weights, beside the naive way: `python -m benchmarks.gate_memory`.

Three Llamas of about a hundred million parameters each, fused, in float32 on the CPU; two steps of `GateTrainer`. The
naive way lets autograd run through the specialists and steps the gate alone. Each runs in a process of its own; memory
is what the process held at its peak beyond what it held before the model was made. Writes `results/gate_memory.json`.
What grows with the tokens at once in stage one is the loss, which holds their logits a few times over.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, set_seed
from transformers.utils import logging

from benchmarks.timing import held
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from trainers import GateStageConfig, GateTrainer
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.quickstart.toy_models import train_tokenizer


ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 8192}
LENGTH, BATCHES = 128, (3, 6)


class NaiveTrainer(GateTrainer):
    """Freezes by leaving the specialists out of the optimizer, as one would without thinking of memory."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.fused.model.fusion_gate.parameters(), lr=1e-3)
        self.fused.requires_grad_(True)
        return self.optimizer


WAYS = {"stage one": GateTrainer, "naive": NaiveTrainer}


def main() -> None:
    """Measures both ways for each batch size, or, told which, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure_peaks(WAYS[options.way], options.batch)))
        return
    rows = []
    for batch in BATCHES:
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--batch", str(batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = round(found["peak"] / found["weights"], 3)
            rows.append({"way": way, "tokens_at_once": LENGTH * batch, "times_weights": ratio, **found})
            print(f"{way}, {LENGTH * batch} tokens at once: {ratio} times the weights", flush=True)
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    machine = {"kind": "cpu", "architecture": platform.machine()}
    result = {"machine": machine, "versions": libraries, "rows": rows}
    (ROOT / "results" / "gate_memory.json").write_text(json.dumps(result, indent=2) + "\n")


def measure_peaks(trainer: type[GateTrainer], batch: int) -> dict[str, int]:
    """Bytes of the weights, and of all that the process held at its peak beyond what it began with."""
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(["memory"], vocab_size=300)
    # a small run first, so that what libraries load when they are first used is not counted
    train(trainer, fused(hidden_size=48, num_hidden_layers=1), tokenizer, batch)
    gc.collect()
    before = held("VmRSS")
    model = fused()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    train(trainer, model, tokenizer, batch)
    return {"weights": weights, "peak": held("VmHWM") - before, "parameters": model.num_parameters()}


def fused(**sizes: int) -> UltraFuserForCausalLM:
    """Built in place: fusing models in memory would hold them twice for a moment, which is not what is measured."""
    specialist = LlamaConfig(**{**SIZES, **sizes}, num_attention_heads=12)
    return UltraFuserForCausalLM(UltraFuserConfig(specialist_names=list(DOMAINS), specialists=[specialist] * 3))


def train(trainer: type[GateTrainer], model: UltraFuserForCausalLM, tokenizer, batch: int) -> None:
    """Two steps of stage one."""
    set_seed(0)
    rows = {key: [list(range(3, 3 + LENGTH))] * 8 for key in ("input_ids", "labels")}
    with tempfile.TemporaryDirectory() as folder:
        arguments = GateStageConfig(
            folder,
            max_steps=2,
            per_device_train_batch_size=batch,
            examples_per_domain=batch // 3,
            max_length=LENGTH,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        data = {name: Dataset.from_dict(rows) for name in DOMAINS}
        trainer(model, arguments, data, processing_class=tokenizer).train()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
