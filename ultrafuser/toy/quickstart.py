"""From nothing to a fused model in minutes: offline, on a CPU, on real text, through the code that real models take."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from trainers import CachedGateTrainer, GateStageConfig, JointStageConfig, JointTrainer

from ..atomic import sole_writer, write_whole
from ..provenance import provenance
from .corpora import DOMAINS, documents, splits


MADE = ("base", *DOMAINS, "stage_one", "stage_two", "fused")  # folders
LENGTH = 256  # tokens per training example
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PROMPTS = {
    "text": "The value of the expression is",
    "code": "class Reader:\n\n    def read(self, size):\n",
    "math": "What is 47 * 36?\n",
}

RELOAD = """
import json, sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser"):
    sys.modules[name] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, pipeline
logging.disable_progress_bar()
logging.set_verbosity_error()
folder, *prompts = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(json.dumps([generate(p, max_new_tokens=24, do_sample=False)[0]["generated_text"] for p in prompts]))
"""


@dataclass
class Schedule:
    """Steps and learning rates of training. The rates are measured to fit specialists of a million parameters."""

    base_steps: int = 100
    specialist_steps: int = 80
    specialist_rate: float = 3e-3
    gate_steps: int = 800
    gate_rate: float = 3e-3
    joint_steps: int = 40
    joint_rate: float = 3e-4


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
    rows["uniform fusion"] = measure_losses(model, held_out)
    data = {d: Dataset.from_dict(dict.fromkeys(("input_ids", "labels"), blocks[d]["fuse"].tolist())) for d in DOMAINS}
    settings = {"per_device_train_batch_size": 12, "examples_per_domain": 4, "max_length": LENGTH, "bf16": False}
    settings |= {"gradient_checkpointing": False, "seed": seed, **_QUIET}
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


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for all specialists alike."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|end|>"]
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def to_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Documents end to end, cut into examples of one length. Shape (examples, LENGTH)."""
    ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def make_specialist(
    blocks: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    schedule: Schedule,
    seed: int,
    base: Path | None = None,
) -> None:
    """Trains a small Llama, from its base or from scratch, on one domain and saves it with its tokenizer."""
    model = new_model(tokenizer, seed) if base is None else LlamaForCausalLM.from_pretrained(base)
    pretrain(model, blocks, folder, schedule.specialist_steps, schedule.specialist_rate, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(model: PreTrainedModel, blocks: Tensor, folder: Path, steps: int, rate: float, seed: int) -> None:
    """Trains a model on blocks of text, 8 at each step. Writes nothing; the folder's name is the bar's title."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        **_QUIET,
        seed=seed,
    )
    dataset = Dataset.from_dict({"input_ids": blocks.tolist(), "labels": blocks.tolist()})
    train(Trainer(model, arguments, train_dataset=dataset), folder.name)
    # the trainer turns it off for good, and a model that is saved so and loaded again would generate without a cache
    model.config.use_cache = True


def train(trainer: Trainer, title: str) -> None:
    """Trains with one bar, if somebody watches, and nothing else on the screen."""

    class Bar(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self.training_bar.set_description(title)

        def on_log(self, args, state, control, **kwargs):
            pass

    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty():
        trainer.add_callback(Bar)
    trainer.train()


# no log lines between the bars, nothing written but what is saved on purpose
_QUIET = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True}


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


def reload_elsewhere(folder: Path, prompts: list[str]) -> list[str]:
    """Runs `pipeline("text-generation")` in a fresh process that cannot import this package.

    Raises:
        RuntimeError: If the folder does not load there.
    """
    found = subprocess.run([sys.executable, "-c", RELOAD, str(folder), *prompts], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"The saved folder {str(folder)!r} did not load in a fresh process:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def _print_outcome(
    console: Console,
    rows: dict[str, dict[str, float]],
    gate_weights: dict[str, list[float]],
    spoken: list[str],
    folder: Path,
    minutes: float,
) -> None:
    numbers = [Column(name, justify="right") for name in (*DOMAINS, "mean")]
    losses = Table("", *numbers, title="\nHeld-out loss, nats per token (lower is better)", title_justify="left")
    best = {d: min(row[d] for row in rows.values()) for d in DOMAINS}
    for name, row in rows.items():
        if name == "uniform fusion":
            losses.add_section()
        cells = [f"[bold green]{row[d]:.3f}[/]" if row[d] == best[d] else f"{row[d]:.3f}" for d in DOMAINS]
        losses.add_row(name, *cells, f"{sum(row.values()) / len(row):.3f}")
    console.print(losses)

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
        f"Talk to it: ultrafuser chat {folder}",
        markup=False,
        soft_wrap=True,
    )
