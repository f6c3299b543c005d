"""Chooses the fastest decoding strategy: all that a model supports, measured on given prompts.

What pays depends on the machine, on the specialists' size and on the text, so nothing is guessed. A way whose greedy tokens
are not the plain way's is left out, as is one that a model cannot do, with the reason. Dropping may give other tokens: it
is measured beside the others, and taken only where it is asked for.
"""

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_ultrafuser import UltraFuserForCausalLM

from ..pretrained import generating
from .compiling import compiled
from .drafting import self_draft
from .dropping import check_droppable, drop_specialists
from .stacking import StackedForCausalLM, stack


EXACT = ("plain", "stacked", "self-drafting", "prompt lookup", "assistant", "compiled", "stacked and compiled")
DROPPING = "dropping"
WAYS = (*EXACT, DROPPING)
COMPILED = EXACT[-2:]
LOOKUP = 5  # tokens
ROUNDS = 3


@dataclass
class Speeds:
    """Measurement of one strategy.

    Attributes:
        tokens_per_second: Of each exact way, over all prompts together; the median over rounds.
        inexact: The same of ways that may give other tokens.
        left_out: Why each other way was not measured, or not counted.
    """

    tokens_per_second: dict[str, float] = field(default_factory=dict)
    inexact: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def fastest(self) -> str:
        """Returns the exact way with the most tokens in a second."""
        return max(self.tokens_per_second, key=self.tokens_per_second.get)


def decoder(
    model: UltraFuserForCausalLM,
    way: str | None = None,
    *,
    inputs: dict[str, Tensor] | None = None,
    assistant: PreTrainedModel | None = None,
    dropping: dict | None = None,
) -> tuple[UltraFuserForCausalLM | StackedForCausalLM, dict]:
    """A way of decoding: the model and the options to generate with.

        model, options = decoder(model, inputs=tokenizer(prompts, padding=True, return_tensors="pt"))
        model.generate(**inputs, **options)

    Args:
        model: A fused model.
        way: One of `WAYS`. Default: the fastest exact one, measured on `inputs`.
        inputs: Prompts such as will be asked, as a tokenizer returns them; several are one batch.
        assistant: For the way of that name: a small model of the same tokenizer, which drafts.
        dropping: For the way of that name: `keep` and `every`, see `drop_specialists`.

    Raises:
        ValueError: If there is no such way, the model cannot go it, or there is nothing to measure on.
    """
    if way is None and inputs is None:
        raise ValueError(f"Give `inputs` to measure on, or say which way to decode: one of {list(WAYS)}.")
    if way is None:
        way = speeds(model, inputs, assistant=assistant).fastest
    if way not in WAYS:
        raise ValueError(f"A way of decoding is one of {list(WAYS)}, but got {way!r}.")
    if way == "assistant" and assistant is None:
        raise ValueError("Assisted decoding needs a small model of the same tokenizer. Pass `assistant`.")
    if way == DROPPING:
        check_droppable(model, **dropping or {})
    options = {
        DROPPING: {"custom_generate": drop_specialists, **(dropping or {})},
        "self-drafting": {"custom_generate": self_draft},
        "prompt lookup": {"prompt_lookup_num_tokens": LOOKUP},
        "assistant": {"assistant_model": assistant},
    }
    chosen = compiled() if way in COMPILED else options.get(way, {})
    return (stack(model) if way.startswith("stacked") else model), chosen


def speeds(
    model: UltraFuserForCausalLM,
    inputs: dict[str, Tensor],
    *,
    ways: tuple[str, ...] | None = None,
    assistant: PreTrainedModel | None = None,
    dropping: dict | None = None,
    max_new_tokens: int = 64,
) -> Speeds:
    """Measures ways of decoding greedily, one after another.

    Args:
        model: A fused model.
        inputs: Prompts as a tokenizer returns them, such as will be asked; several are one batch.
        ways: Of `WAYS`. Default: all exact ones but those that compile, which may take minutes.
        assistant: See `decoder`.
        dropping: See `decoder`.
        max_new_tokens: Of each prompt, in each of a few rounds.

    Raises:
        ValueError: If one of `ways` is unknown.
    """
    ways = ways or tuple(w for w in EXACT if w not in COMPILED and (w != "assistant" or assistant is not None))
    if set(ways) - set(WAYS):
        raise ValueError(f"Ways of decoding are {list(WAYS)}, but got {sorted(set(ways) - set(WAYS))}.")
    found, expected = Speeds(), _text(model, inputs, max_new_tokens, {})
    for way in ways:
        try:
            able, options = decoder(model, way, assistant=assistant, dropping=dropping)
            text, speed = tokens_per_second(able, inputs, max_new_tokens, options)
        except ValueError as error:
            found.left_out[way] = str(error)
            continue
        if way not in EXACT:
            found.inexact[way] = speed
        elif torch.equal(text, expected):
            found.tokens_per_second[way] = speed
        else:
            found.left_out[way] = "Its greedy tokens are not those of the plain way: in 16 bits near ties may turn."
    return found


def tokens_per_second(
    model: PreTrainedModel, inputs: dict[str, Tensor], max_new_tokens: int, options: dict | None = None
) -> tuple[Tensor, float]:
    """Generates greedily and measures the speed: the median over a few rounds.

    The first round is not counted, in which things are made that are made once, such as graphs.
    """
    options, seconds = options or {}, []
    text = _text(model, inputs, max_new_tokens, options)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        _text(model, inputs, max_new_tokens, options)
        seconds.append(time.perf_counter() - start)
    return text, (text.numel() - inputs["input_ids"].numel()) / statistics.median(seconds)


def _text(model: PreTrainedModel, inputs: dict[str, Tensor], max_new_tokens: int, options: dict) -> Tensor:
    # to its full length, so that all rounds are alike; on the processor, so that all of it is there
    length = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "stop_strings": None}
    # a way that cannot be gone is no fault of the settings of generation
    with nullcontext() if options else generating(model):
        return model.generate(**inputs, **length, do_sample=False, **options).cpu()
