"""From nothing to a fused model in minutes: offline, on a CPU, on real text, through the code that real models take."""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from trainers import CachedGateTrainer, GateStageConfig, JointStageConfig, JointTrainer

from ..atomic import sole_writer, write_whole
from ..provenance import provenance
from .corpora import DOMAINS, documents, splits
from .outcome import loss_table, reload_elsewhere
from .toy_models import LENGTH, Schedule, make_specialist, to_blocks, train_tokenizer
from .training import QUIET, train


MADE = ("base", *DOMAINS, "stage_one", "stage_two", "fused")  # folders
UNIFORM = "uniform fusion"
PROMPTS = {
    "text": "The value of the expression is",
    "code": "class Reader:\n\n    def read(self, size):\n",
    "math": "What is 47 * 36?\n",
}


def run(
    out: Path, *, seed: int = 0, schedule: Schedule | None = None, overwrite: bool = False
) -> dict[str, dict[str, float]]:
    """Makes three specialists of one base, fuses them, trains both stages, saves, reloads elsewhere, and prints what came out.

    Args:
        out: Folder for the specialists (`out/text`, ...) and the fused model (`out/fused`).
        seed: Same seed, same numbers on the same machine.
        schedule: Training steps and learning rates.
        overwrite: Replace what an earlier quickstart made there.

    Raises:
        FileExistsError: If there is something in `out` that is not to be replaced, or is not a quickstart's.

    Returns:
        Held-out loss in nats per token, by row of the printed table and domain.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"Nothing is overwritten unasked, but {str(out)!r} is not empty. Use --out or --overwrite."
        )
    with sole_writer(out, "quickstart", ["*"]):
        for name in MADE:
            shutil.rmtree(out / name, ignore_errors=True)
        return _run(out, seed, schedule or Schedule())


def _run(out: Path, seed: int, schedule: Schedule) -> dict[str, dict[str, float]]:
    console = Console(highlight=False)
    began = time.monotonic()
    set_seed(seed)

    console.print("[bold]1/5[/] Text, code and mathematics from what this machine has")
    parts = {domain: splits(documents(domain, seed)) for domain in DOMAINS}
    tokenizer = train_tokenizer([text for part in parts.values() for text in part["specialist"]])
    blocks = {d: {name: to_blocks(texts, tokenizer) for name, texts in parts[d].items()} for d in DOMAINS}
    held_out = {d: blocks[d]["held_out"] for d in DOMAINS}

    console.print("[bold]2/5[/] A small base, and three specialists that go on from it, each on its own domain only")
    every = torch.cat([blocks[d]["specialist"] for d in DOMAINS])
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]
    make_specialist(every, tokenizer, out / "base", replace(schedule, specialist_steps=schedule.base_steps), seed)
    folders = {d: out / d for d in DOMAINS}
    for domain, folder in folders.items():
        make_specialist(blocks[domain]["specialist"], tokenizer, folder, schedule, seed, out / "base")

    console.print("[bold]3/5[/] Fused; then stage one: the gate alone, on text the specialists have not seen")
    model = UltraFuserForCausalLM.from_specialists(folders)
    tokenizer = common_tokenizer(folders)
    rows = {f"{d} specialist": measure_losses(model.specialist(d), held_out) for d in DOMAINS}
    rows[UNIFORM] = measure_losses(model, held_out)
    data = {d: Dataset.from_dict(dict.fromkeys(("input_ids", "labels"), blocks[d]["fuse"].tolist())) for d in DOMAINS}
    settings = {"per_device_train_batch_size": 12, "examples_per_domain": 4, "max_length": LENGTH, "bf16": False}
    settings |= {"gradient_checkpointing": False, "seed": seed, **QUIET}
    steps, rate = schedule.gate_steps, schedule.gate_rate
    arguments = GateStageConfig(str(out / "stage_one"), max_steps=steps, learning_rate=rate, **settings)
    # the specialists do not change, so they run over the text once
    with TemporaryDirectory() as cache:
        train(CachedGateTrainer(model, arguments, data, processing_class=tokenizer, cache=cache), "gate")
    rows["stage one: gate"] = measure_losses(model, held_out)

    console.print("[bold]4/5[/] Stage two: gate and specialists together")
    steps, rate = schedule.joint_steps, schedule.joint_rate
    arguments = JointStageConfig(str(out / "stage_two"), max_steps=steps, learning_rate=rate, **settings)
    train(JointTrainer(model, arguments, data, processing_class=tokenizer), "gate and specialists")
    rows["stage two: everything"] = measure_losses(model, held_out)

    console.print("[bold]5/5[/] Saved, and reloaded in a process that cannot import this package")
    fused = out / "fused"
    model.save_pretrained(fused)
    tokenizer.save_pretrained(fused)
    spoken = reload_elsewhere(fused, list(PROMPTS.values()))
    weights = mean_gate_weights(model, held_out)
    found = {"seed": seed, "schedule": asdict(schedule), **provenance(), "nats_per_token": rows}
    write_whole(out / "results.json", json.dumps({**found, "mean_gate_weights": weights}, indent=2) + "\n")
    _print_outcome(console, rows, weights, spoken, fused, minutes=(time.monotonic() - began) / 60)
    return rows


@torch.inference_mode()
def measure_losses(model: PreTrainedModel, held_out: dict[str, Tensor], batch_size: int = 32) -> dict[str, float]:
    """Held-out loss by domain, in nats per token."""
    model.eval()
    losses = {}
    for domain, blocks in held_out.items():
        total = 0.0
        for batch in blocks.split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            total += F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        losses[domain] = total / blocks[:, 1:].numel()
    return losses


def mean_gate_weights(model: UltraFuserForCausalLM, held_out: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean share of each specialist in each domain's tokens."""
    return {domain: model.gate_weights(blocks[:64]).mean((0, 1)).tolist() for domain, blocks in held_out.items()}


def _print_outcome(
    console: Console,
    rows: dict[str, dict[str, float]],
    gate_weights: dict[str, list[float]],
    spoken: list[str],
    folder: Path,
    minutes: float,
) -> None:
    console.print(loss_table(rows, UNIFORM))

    numbers = [Column(name, justify="right") for name in DOMAINS]
    title = "\nWho speaks: mean gate weight after stage two"
    weights = Table("on tokens of", *numbers, title=title, title_justify="left")
    for domain, row in gate_weights.items():
        weights.add_row(domain, *(f"{w:.2f}" for w in row))
    console.print(weights)

    console.print("\nThe fused model continues a prompt of each domain:")
    for text in spoken:
        console.print(f"  {text!r}", markup=False)
    console.print(
        f"\nEach specialist is good at its own domain. Averaging all three (uniform fusion) blurs them; the gate "
        f"learns from the tokens so far who should speak, and stage two lets them adapt to each other.\n"
        f"Took {minutes:.1f} minutes. The fused model is one folder that loads anywhere:\n"
    )
    # to be pasted: neither indented nor broken where the window ends
    console.print(
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)\n\n"
        f"Talk to it: ultrafuser chat {folder}\n"
        f"A model that answers: ultrafuser quickstart --real",
        markup=False,
        soft_wrap=True,
    )
