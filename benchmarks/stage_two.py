"""Peak memory and time of a step of stage two, all specialists at once and one at a time: `python -m benchmarks.stage_two`.

Three Llamas of about 20 million parameters each, fused, in float32 on the CPU with one thread; whole optimizer steps of
one `JointTrainer` on about 2000 tokens: forward, loss, backward, AdamW. The ways take turns from step to step of one run,
and each is divided by "plain" of the same round: the median over rounds, with the smallest and the largest. Time is
processor time. Memory is what the process held at most beyond what it held just before the step: activations, gradients
and what the optimizer needs meanwhile, but neither weights nor the optimizer's state. Before that, runs of each way on
small specialists must end with the same weights, bit for bit. Writes `results/stage_two.json`.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.timing import held
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from trainers import JointStageConfig, JointTrainer
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.quickstart.toy_models import train_tokenizer


RESULTS = Path(__file__).parent.parent / "results" / "stage_two.json"
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 16384}
SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
# name to whether layers are checkpointed, and whether specialists take turns
WAYS = {
    "plain": (False, False),
    "layer checkpointing": (True, False),
    "one at a time": (False, True),
    "one at a time, layer checkpointing": (True, True),
}


def main() -> None:
    """Checks that all ways train alike, then measures them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2046, help="of one step, over three rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    check()
    model = fused(**SIZES)
    measured = Measured(options.rounds)
    train(model, options.tokens // 3, 1 + options.rounds * len(WAYS), measured)
    shape = {"specialists": 3, **SIZES, "parameters": model.num_parameters(), "tokens": options.tokens // 3 * 3}
    result = {**provenance(), "shape": {**shape, "rounds": options.rounds}, "rows": rows(measured.found)}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


class Measured(TrainerCallback):
    """Gives each step to the next way, and measures it. The first step of all only makes the optimizer's state."""

    def __init__(self, rounds: int):
        self.order = ["plain", *list(WAYS) * rounds]
        self.found: dict[str, list[tuple[float, int]]] = {name: [] for name in WAYS}

    def begin(self, trainer: JointTrainer) -> None:
        """Learns whom to switch."""
        self.trainer, self.serial = trainer, trainer.serial

    def on_step_begin(self, args, state, control, **kwargs):
        checkpointing, one_at_a_time = WAYS[self.order[state.global_step]]
        self.trainer.serial = self.serial if one_at_a_time else None
        model = self.trainer.fused
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before, self.began = held("VmRSS"), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, peak = time.process_time() - self.began, held("VmHWM") - self.before
        if state.global_step > 1:
            self.found[self.order[state.global_step - 1]].append((seconds, peak))
            print(f"{self.order[state.global_step - 1]}: {seconds:.1f} s, {peak / 2**20:.0f} MiB", flush=True)


def rows(found: dict[str, list[tuple[float, int]]]) -> list[dict]:
    """One row per way."""
    table = []
    for name, steps in found.items():
        pairs = list(zip(steps, found["plain"], strict=True))
        time, peak = ([own[i] / plain[i] for own, plain in pairs] for i in (0, 1))
        row = {"way": name, **spread("time", time), **spread("peak", peak)}
        row |= {"seconds": [round(s, 2) for s, _ in steps], "peak_bytes": [p for _, p in steps]}
        print(f"{name}: {row['time']} of the time {row['time_range']}, {row['peak']} of the peak {row['peak_range']}")
        table.append(row)
    return table


def spread(name: str, ratios: list[float]) -> dict:
    """Median, and the smallest and largest."""
    return {
        name: round(statistics.median(ratios), 3),
        f"{name}_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def check() -> None:
    """All ways end with the same weights."""
    expected = None
    for name, (checkpointing, one_at_a_time) in WAYS.items():
        model = fused(**SMALL)
        train(model, 16, 2, None, gradient_checkpointing=checkpointing, one_specialist_at_a_time=one_at_a_time)
        expected = model.state_dict() if expected is None else expected
        different = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, expected[n])]
        if different:
            raise AssertionError(f"{name} trains {different} otherwise than plain.")


def fused(**sizes: int) -> UltraFuserForCausalLM:
    """Specialists of one size, with random weights."""
    set_seed(0)
    specialist = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=6)
    return UltraFuserForCausalLM(UltraFuserConfig(specialist_names=list(DOMAINS), specialists=[specialist] * 3))


def train(model: UltraFuserForCausalLM, length: int, steps: int, measured: Measured | None, **settings) -> None:
    """Steps of stage two on rows of random tokens. The norm of gradients is not bounded: no two ways bound it alike."""
    tokens = torch.randint(3, model.config.vocab_size, (len(DOMAINS), 4, length)).tolist()
    data = {name: Dataset.from_dict({"input_ids": t, "labels": t}) for name, t in zip(DOMAINS, tokens, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"gradient_checkpointing": False, "one_specialist_at_a_time": measured is not None, **settings}
        arguments = JointStageConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=len(DOMAINS),
            examples_per_domain=1,
            max_length=length,
            max_grad_norm=0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **settings,
        )
        tokenizer = train_tokenizer(["memory"], vocab_size=300)
        trainer = JointTrainer(model, arguments, data, processing_class=tokenizer)
        if measured is not None:
            measured.begin(trainer)
            trainer.add_callback(measured)
        trainer.train()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
