"""Tunes one LoRA adapter of the base on conversations. Killed, it goes on from its last checkpoint.

python -m experiments.real.tuning --base BASE --data math.jsonl --out math --steps 1000
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.real.packing import IGNORED, Batch, collate, rows_of, shared_start, tokenised


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINT = "checkpoint.pt"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="JSON lines with `messages`")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--start", help="folder of an adapter to go on from; default: a new one")
    parser.add_argument("--rank", type=int, default=8, help="of a new adapter")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    tune(parser.parse_args())


def tune(options: argparse.Namespace) -> None:
    """Trains to the last step and saves the adapter."""
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = adapted(options.base, options.rank, options.start).to(options.device)
    if options.compile:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    step = restore(options.out, model, optimizer)
    batches = Batches(tokenizer, options)
    log = Log(options.out, options.steps)
    while step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * schedule(step, options.steps)
        batch = Batch(*(part.to(options.device) for part in batches.at(step)))
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.add(step, loss.item(), batch)
        if step % options.save_every == 0 or step == options.steps:
            save(options.out, model, optimizer, step)


def adapted(base: str, rank: int, start: str | None = None):
    """The base with a LoRA adapter to train: the one in `start`, or a new one on all linear layers of its blocks."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if start:
        return PeftModel.from_pretrained(model, start, is_trainable=True).float()
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    )


def loss_of(model, batch: Batch):
    """Mean loss of the learned tokens. The head sees those alone."""
    inner = model.base_model.model
    states = inner.model(
        input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state[:, :-1]
    targets = batch.labels[:, 1:]
    learned = targets != IGNORED
    return functional.cross_entropy(inner.lm_head(states[learned]).float(), targets[learned])


def schedule(step: int, steps: int, warmup: int = 20, decay: float = 0.3) -> float:
    """Share of the learning rate: rises, stays, falls to zero along a cosine at the end."""
    left = (steps - step) / (decay * steps)
    return min(1.0, (step + 1) / warmup, 0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


class Batches:
    """Batches by step: the same at every run, whether it is the first or goes on."""

    def __init__(self, tokenizer, options: argparse.Namespace):
        self.start = shared_start(tokenizer)
        rows = [json.loads(line) for path in options.data for line in Path(path).read_text().splitlines()]
        self.examples = [tokenised(tokenizer, row["messages"], len(self.start)) for row in rows]
        self.options, self.pad = options, tokenizer.pad_token_id
        self.epoch, self.rows = -1, []
        self.per_epoch = len(self._epoch_rows(0)) // options.rows

    def _epoch_rows(self, epoch: int):
        if epoch != self.epoch:
            random = Random(f"{self.options.seed} {epoch}")
            self.rows = rows_of(self.examples, self.options.length - len(self.start), random)
            self.epoch = epoch
        return self.rows

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        epoch, within = divmod(step, self.per_epoch)
        rows = self._epoch_rows(epoch)[within * self.options.rows : (within + 1) * self.options.rows]
        return collate(rows, self.start, self.options.length, self.pad)


class Log:
    """A line of progress every half minute, and all losses in a file."""

    def __init__(self, out: Path, steps: int, every: float = 30):
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.steps, self.every = out / "log.jsonl", steps, every
        self.shown = self.began = time.monotonic()
        self.cpu, self.losses, self.first = time.process_time(), [], None

    def add(self, step: int, loss: float, batch: Batch) -> None:
        """Writes a step's loss, and says how far it is if it has been silent long enough."""
        self.first = step - 1 if self.first is None else self.first
        self.losses.append(loss)
        now, learned = time.monotonic(), int((batch.labels != IGNORED).sum())
        line = {
            "step": step,
            "loss": round(loss, 4),
            "learned": learned,
            "cpu": round(time.process_time() - self.cpu, 1),
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if now - self.shown < self.every and step < self.steps:
            return
        left = (now - self.began) / (step - self.first) * (self.steps - step)
        mean = sum(self.losses) / len(self.losses)
        print(f"step {step} of {self.steps}: loss {mean:.3f}, {left / 60:.0f} minutes left", flush=True)
        self.shown, self.losses = now, []


def save(out: Path, model, optimizer, step: int) -> None:
    """Writes the adapter in bfloat16, and beside it what training needs to go on, whole or not at all."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    partial = out / (CHECKPOINT + ".partial")
    torch.save({"step": step, "weights": weights, "optimizer": optimizer.state_dict()}, partial)
    os.replace(partial, out / CHECKPOINT)
    save_adapter(out, model)


def save_adapter(out: Path, model) -> None:
    """Writes the adapter as PEFT does, in bfloat16."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(out)
    path = out / "adapter_model.safetensors"
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


def restore(out: Path, model, optimizer) -> int:
    """Takes up the last checkpoint, if there is one. Returns its step."""
    path = out / CHECKPOINT
    if not path.exists():
        return 0
    found = torch.load(path, weights_only=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in found["weights"].items():
            parameters[name].copy_(value)
    optimizer.load_state_dict(found["optimizer"])
    return found["step"]


if __name__ == "__main__":
    main()
