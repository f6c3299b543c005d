"""Full models that were "tuned" from one tiny base: its weights and random changes."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import specialist, tokenizer


NAMES = ("text", "code", "math")


def changed(model: PreTrainedModel, seed: int, rank: int | None = None, norms: bool = False) -> PreTrainedModel:
    """Adds to every matrix a change of a rank, by default a full one; and to norms, if asked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.ndim == 1 and not norms:
                continue
            shape = parameter.shape
            if parameter.ndim == 1 or rank is None:
                change = torch.randn(shape, generator=generator)
            else:
                left, right = (torch.randn(n, rank, generator=generator) for n in shape)
                change = left @ right.T / rank**0.5
            parameter += 0.1 * change
    return model


def make(
    folder: Path, family: str = "llama", *, rank: int | None = None, norms: bool = False, **fields
) -> dict[str, str]:
    """Writes a base and models that differ from it. Returns name to folder."""
    for seed, name in enumerate(("base", *NAMES)):
        set_seed(0)
        model = specialist(family, **fields)
        if name != "base":
            changed(model, seed, rank, norms)
        model.save_pretrained(folder / name)
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / name)
    return {name: str(folder / name) for name in NAMES}
