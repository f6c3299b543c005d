"""Benchmarks a fused folder's decoding strategies on this machine, beside its specialists."""

from rich.filesize import decimal
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.sparsifiers_ultrafuser import sparsifier

from ..decoding.choosing import COMPILED, DROPPING, WAYS, Speeds, decoder, speeds, tokens_per_second
from ..pretrained import load_model


PROMPT = "def area(width, height):\n"
STREAMED = ("plain", "stacked", DROPPING)  # each token with its gate weights, as a chat shows them


def measure_decoding(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    new_tokens: int,
    compile_steps: bool = False,
    assistant: str | None = None,
    dropping: dict | None = None,
) -> tuple[dict[str, float], Speeds]:
    """Tokens per second of each specialist alone, and of every way in which the fused model decodes.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        prompts: Such as will be asked; several are one batch.
        new_tokens: Of each prompt.
        compile_steps: Whether to measure the ways that compile, too.
        assistant: Folder or Hub id of a small model of the same tokenizer, to draft.
        dropping: Settings of dropping, see `decoder`.
    """
    inputs = _inputs(model, tokenizer, prompts)
    drafter = assistant and load_model(assistant, dtype="auto").to(model.device)
    ways = tuple(w for w in WAYS if (w not in COMPILED or compile_steps) and (w != "assistant" or drafter))
    alone = {
        name: tokens_per_second(model.specialist(name), inputs, new_tokens)[1]
        for name in model.config.specialist_names
    }
    settings = {"assistant": drafter, "dropping": dropping, "max_new_tokens": new_tokens}
    return alone, speeds(model, inputs, ways=ways, **settings)


def table(model: UltraFuserForCausalLM, alone: dict[str, float], found: Speeds) -> Table:
    """Tables the measurements, beside the fastest specialist."""
    best = max(alone.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    shown = Table("", "tokens/s", "time / specialist's", "weights")
    for name, config in zip(model.config.specialist_names, model.config.specialists, strict=True):
        own = model.specialist(name).num_parameters() * model.dtype.itemsize
        shown.add_row(
            f"{name} alone ({config.model_type})", f"{alone[name]:.1f}", f"{best / alone[name]:.2f}", decimal(own)
        )
    shown.add_section()
    for way, speed in sorted(found.tokens_per_second.items(), key=lambda item: -item[1]):
        # stacked specialists are copies, made while the ordinary ones are there
        held = weights * 2 if way.startswith("stacked") else weights
        mark = " (fastest)" if way == found.fastest else ""
        shown.add_row(f"fused, {way}{mark}", f"{speed:.1f}", f"{best / speed:.2f}", decimal(held))
    for way, speed in found.inexact.items():
        shown.add_row(f"fused, {way} (other tokens)", f"{speed:.1f}", f"{best / speed:.2f}", decimal(weights))
    return shown


def check_streamed(way: str, **dropping: str | int | None) -> dict[str, str | int]:
    """Rejects a way of decoding and settings of dropping, as far as that takes no model.

    Args:
        way: As for `for_streaming`.
        **dropping: `keep` and `every`; None is not given.

    Returns:
        The settings that are given.

    Raises:
        ValueError: If there is no such way or setting, or settings would have no effect.
    """
    if way not in (*STREAMED, "auto"):
        raise ValueError(f"Answers are decoded in one of the ways {[*STREAMED, 'auto']}, but got {way!r}.")
    given = {name: value for name, value in dropping.items() if value is not None}
    if given and way != DROPPING:
        options = " and ".join(f"--{name} {value}" for name, value in given.items())
        raise ValueError(
            f"{options} is of dropping, but answers are decoded in the way {way!r}. Say --decoding dropping, or leave it out."
        )
    check_keep(dropping.get("keep"))
    return given


def check_keep(keep: str | None) -> None:
    """Rejects an unknown sparsifier for dropping. None is not given."""
    if keep is not None:
        sparsifier(keep)


def for_streaming(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, way: str, dropping: dict | None = None
) -> tuple[UltraFuserForCausalLM, dict]:
    """Returns the model to decode with token by token, and options of `generate`.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        way: One of `STREAMED`; or "auto" for what is faster of the exact ones.
        dropping: Settings of dropping, see `decoder`.

    Raises:
        ValueError: If there is no such way, or the model cannot go it.
    """
    check_streamed(way)
    if way == "auto":
        exact = tuple(way for way in STREAMED if way != DROPPING)
        way = speeds(model, _inputs(model, tokenizer, [PROMPT]), ways=exact).fastest
    return decoder(model, way, dropping=dropping)


def _inputs(model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, padding=len(prompts) > 1, padding_side="left", return_tensors="pt").to(model.device)
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}
