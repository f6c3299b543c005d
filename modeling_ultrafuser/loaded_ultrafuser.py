"""Checks of what loading has made of a fused model."""

import re

from torch import Tensor, nn

from .compat_ultrafuser import forget


def refuse_other_specialists(names: list[str], parts: list[str], parameters: list[str], loading_info) -> None:
    """Rejects a checkpoint of other specialists than the configuration names, with one sentence.

    Nothing is said if no specialist was in the checkpoint at all: an adapter, or an empty state on purpose.

    Args:
        names: Of the specialists.
        parts: Names in `Specialists`: theirs, or the base's.
        parameters: Names of the model's.
        loading_info: The library's, of what is missing and what is left over.
    """

    def specialist_of(key: str) -> str | None:
        found = re.search(r"(?:^|\.)specialists\.(\w+)\.", key)
        return found and found[1]

    extra = {specialist_of(key) for key in loading_info.unexpected_keys} - {*parts, None}
    found = {specialist_of(key) for key in parameters if key not in loading_info.missing_keys} - {None}
    shapes = [
        f"`{key}` has shape {tuple(saved)} there and {tuple(own)} here"
        for key, saved, own in sorted(loading_info.mismatched_keys)
        if (key == "lm_head.weight" and saved[-1] != own[-1])
        or ("fusion_gate." in key and own[0] == len(names) and saved[0] != own[0])
        or (".lora_" in key and saved[0] != own[0])
    ]
    no_adapters = found and any(".lora_" in key for key in loading_info.missing_keys if key in parameters)
    if extra or shapes or no_adapters or 0 < len(found) < len(parts):
        there = [n for n in parts if n in found] + sorted(extra)
        forget(loading_info)
        raise ValueError(
            f"A checkpoint must hold the specialists that its configuration names, because gate and head have a part "
            f"for each, but it holds {len(there)} ({there}) and the configuration names {len(names)} ({names})"
            f"{''.join('; ' + shape for shape in shapes)}. Load it with the config.json that was saved with it, or fuse "
            f"anew with `UltraFuserForCausalLM.from_specialists`."
        )


def is_plain(weight: Tensor) -> bool:
    """Returns whether a tensor is unquantized. `is_floating_point()` is not enough: torchao's quantized tensors are, too."""
    ours = type(weight.data).__module__.split(".")[0] == "torch"
    return ours and weight.is_floating_point() and weight.element_size() > 1


def refuse_quantised_head(head: nn.Module | None) -> None:
    """Rejects a head without plain weights. Quantisers leave it alone unless they are told what to leave alone."""
    weight = getattr(head, "weight", None)
    if head is None or (isinstance(weight, Tensor) and is_plain(weight)):
        return
    raise ValueError(
        f"The head of a fused model must have plain weights, because each specialist has columns of its own in it, but "
        f"it became a {type(head).__name__} of {type(weight).__name__}. Add 'lm_head' to the modules that the quantiser "
        f"leaves alone: llm_int8_skip_modules=['lm_head', ...] of BitsAndBytesConfig, modules_to_not_convert=['lm_head', "
        f"...] of others. Without a list they do so by themselves."
    )
