"""Held-out losses of compressed specialists, beside what they were compressed from, and tables of both."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedModel

from modeling_ultrafuser.refusals_ultrafuser import Refusal

from ..evaluation.held_out_files import read_domains
from ..evaluation.measurement import HeldOut, mean_loss
from ..pretrained import load_model
from .compressing import BASE, Compression
from .full_models import Checkpoint


EXAMPLES, MAX_LENGTH, PROMPT_TOKENS = 200, 1024, 32
MOST_LOST = 0.1  # of the gain of tuning


def read_data(compression: Compression, data: Mapping[str, str]) -> dict[str, HeldOut]:
    """Reads held-out examples of each specialist's domain.

    Args:
        compression: What is to be measured.
        data: Specialist to a JSON Lines file, or a data set of the Hub as `id` or `id:split`.

    Raises:
        ValueError: If there is no such specialist, or no tokenizer.
        OSError: If a file cannot be read.
    """
    names = list(compression.specialists)
    if unknown := sorted(set(data) - set(names)):
        raise Refusal(
            f"there is data for {unknown}", "Each specialist is measured on its own", f"Name some of {names}."
        )
    if data and compression.tokenizer is None:
        raise Refusal("no folder holds a tokenizer", "Held-out text is read by one", "Save it beside the base.")
    context = getattr(compression.base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limits = {"max_length": min(MAX_LENGTH, context or MAX_LENGTH), "prompt_tokens": PROMPT_TOKENS}
    return read_domains(data, compression.tokenizer, examples=EXAMPLES, **limits)


def losses(compression: Compression, out: Path, data: Mapping[str, HeldOut]) -> dict[str, dict[str, float]]:
    """Measures every specialist on its own domain.

    Args:
        compression: What was compressed.
        out: The folder that was written.
        data: Held-out examples by specialist.

    Returns:
        By specialist, nats per token of the `base`, of the `full` model, of that with the `shared` tensors that LoRA does
        not hold, and `compressed`; and the share of the gain of tuning that is `kept`.
    """
    return {name: _losses(compression, compression.specialists[name], out, held) for name, held in data.items()}


def _losses(compression: Compression, specialist: Checkpoint, out: Path, held: HeldOut) -> dict[str, float]:
    base = mean_loss(_loaded(compression.base), held)
    model = _loaded(specialist)
    full = mean_loss(model, held)
    written = Checkpoint(BASE, str(out / BASE))
    model.load_state_dict({key: written.tensor(key) for key in written.others}, strict=False)
    shared = mean_loss(model, held)
    compressed = mean_loss(compressed_model(out, specialist.name), held)
    kept = (base - compressed) / (base - full) if base > full else float("nan")
    return {"base": base, "full": full, "shared": shared, "compressed": compressed, "kept": kept}


def _loaded(checkpoint: Checkpoint) -> PreTrainedModel:
    return load_model(checkpoint.source, dtype="auto", device_map=_device(), **checkpoint.hub)


def compressed_model(out: Path, name: str) -> PreTrainedModel:
    """Loads a compressed specialist as PEFT reads it."""
    base = load_model(out / BASE, dtype="auto", device_map=_device())
    return PeftModel.from_pretrained(base, out / name).eval()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def warning(measured: Mapping[str, Mapping[str, float]]) -> str | None:
    """Says which specialists lost much of what tuning gave them."""
    lost = {name: 1 - of["kept"] for name, of in measured.items() if not of["kept"] >= 1 - MOST_LOST}
    if not lost:
        return None
    less = [f"{name} lost {share:.0%} of the gain of tuning" for name, share in lost.items() if share == share]
    none = [name for name, share in lost.items() if share != share]
    parts = [f"{', '.join(less)}. Choose a higher --rank, a smaller --error, or keep the full models."] if less else []
    if none:
        parts.append(
            f"{none} predict these data no better than their base even before compression, so that there is no gain to keep. "
            f"Give --data of what they were tuned for."
        )
    return f"Warning: {' '.join(parts)}"


def table(reports: Mapping[str, dict], measured: Mapping[str, Mapping[str, float]]) -> Table:
    """Puts what is kept of each specialist, and its losses, into a table."""
    columns = ["", "numbers", "of all", "rank", "error of layers"]
    if measured:
        columns += ["base", "full", "norms shared", "compressed", "gain kept"]
    found = Table(*columns)
    for name, report in reports.items():
        of = measured.get(name)
        cells = [] if of is None else [f"{of[key]:.3f}" for key in ("base", "full", "shared", "compressed")]
        kept = [] if of is None else [f"{of['kept']:.0%}" if of["kept"] == of["kept"] else "no gain"]
        found.add_row(name, *_cells(report), *cells, *kept)
    return found


def _cells(report: dict) -> list[str]:
    ranks = [about["rank"] for about in report["layers"].values()] or [0]
    errors = [about["error"] for about in report["layers"].values()] or [0.0]
    return [
        f"{report['numbers']:,}",
        f"{report['numbers'] / report['of']:.0%}",
        f"{min(ranks)} to {max(ranks)}",
        f"{median(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})",
    ]
