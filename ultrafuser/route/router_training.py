"""Trains a router on data by domain, and saves it: what `ultrafuser route` does."""

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM

from ..atomic import new_folder
from ..evaluation.held_out_files import read_domains
from ..evaluation.measurement import HeldOut, score
from ..pretrained import fused_config, open_fused, read_tokenizer
from .prompt_reading import Prompts, left_padded
from .router_base import Examples
from .router_files import router_named, save_router


BATCH = 16  # prompts


def train(
    model: str, data: Mapping[str, str], out: Path, kind: str, *, examples: int, max_length: int, prompt_tokens: int
) -> float:
    """Trains a router for a fused model.

    Args:
        model: Folder or Hub id of the model.
        data: Data by domain, see `read_domains`.
        out: Folder to write.
        kind: Name of a router that is trained, and its setting: "words", "nearest:9".
        examples: Most examples of each domain.
        max_length: Longer examples are cut, in tokens.
        prompt_tokens: First tokens of plain text, which are the prompt.

    Returns:
        Share of the examples for which it chooses the specialist with the least loss.

    Raises:
        ValueError: If there is no such router, or the data cannot be read: before any weight is loaded.
        FileExistsError: If there is something in the output folder.
    """
    cls, settings = router_named(kind, trained=True)
    context = fused_config(model).max_position_embeddings
    limits = {"max_length": min(max_length, context or max_length), "prompt_tokens": prompt_tokens}
    held = read_domains(data, read_tokenizer(model), examples=examples, **limits)
    with new_folder(out) as folder, torch.no_grad():
        found = measured(*open_fused(model), held)
        router = cls.trained(found, settings)
        names = found.prompts[0].model.config.specialist_names
        save_router(folder, kind.partition(":")[0], router, names)
        chosen = torch.cat([router.prior(batch).argmax(-1) for batch in found.prompts])
    return (chosen == found.best).float().mean().item()


def measured(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, HeldOut]
) -> Examples:
    """Measures each specialist of a model on the answers of examples by domain."""
    losses = []
    for name in track(model.config.specialist_names, "Measuring", transient=True):
        specialist = model.specialist(name)
        losses.append(torch.cat([answer_losses(score(specialist, own).losses, own) for own in data.values()]))
    prompts = [batch for own in data.values() for batch in prompts_of(model, tokenizer, own)]
    domains = [domain for domain, own in data.items() for _ in range(len(own))]
    return Examples(prompts, torch.stack(losses, -1), domains)


def answer_losses(losses: torch.Tensor, data: HeldOut) -> torch.Tensor:
    """Averages losses over the tokens of each answer. Shapes (examples, seq) to (examples,)."""
    return (losses * data.scored).sum(-1) / data.scored.sum(-1)


def prompts_of(model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, data: HeldOut) -> list[Prompts]:
    """Cuts the prompts out of examples, in batches."""
    rows = [ids[kept] for ids, kept in zip(data.input_ids, data.prompt, strict=True)]
    batches = [left_padded(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    return [Prompts(model, tokenizer, *(tensor.to(model.device) for tensor in batch)) for batch in batches]
