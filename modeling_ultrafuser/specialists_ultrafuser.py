"""Specialists side by side: what their modules, inputs, masks, outputs and checkpoints have to do with each other."""

import re
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .cache_ultrafuser import SpecialistCache, paged_window
from .families_ultrafuser import specialist_layer_types
from .versions_ultrafuser import CACHE, OLD_CACHE


NO_ROUTER_LOSS = (
    "output_router_logits=True of its configuration is set to False, because a fused model's loss has no part that balances "
    "the experts inside a specialist."
)

# the one part of `Specialists` where all specialists are adapters of it
BASE = "base"


class Specialists(nn.ModuleDict):
    """The specialists' backbones by name; or `BASE` alone, where specialists are adapters of one base.

    `PreTrainedModel.post_init` collects what follows from its direct children only, by attribute name: without these
    properties `device_map="auto"` could cut a decoder layer in two and tensor-parallel plans would be empty.
    """

    _no_split_modules = property(lambda self: self._union("_no_split_modules"))
    _keep_in_fp32_modules = property(lambda self: self._union("_keep_in_fp32_modules"))
    _keep_in_fp32_modules_strict = property(lambda self: self._union("_keep_in_fp32_modules_strict"))
    _skip_keys_device_placement = property(lambda self: self._union("_skip_keys_device_placement"))
    _keys_to_ignore_on_load_unexpected = property(lambda self: self._union("_keys_to_ignore_on_load_unexpected"))
    _keys_to_ignore_on_load_missing = property(lambda self: self._union("_keys_to_ignore_on_load_missing"))
    _keys_to_ignore_on_save = property(lambda self: self._prefixed_set("_keys_to_ignore_on_save"))
    _tp_plan = property(lambda self: self._prefixed_dict("_tp_plan"))
    _ep_plan = property(lambda self: self._prefixed_dict("_ep_plan"))
    _fsdp_plan = property(lambda self: self._prefixed_dict("_fsdp_plan"))

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        pairs = [(name, tied) for name, m in self.items() for tied in m.all_tied_weights_keys.items()]
        return {f"{name}.{target}": f"{name}.{source}" for name, (target, source) in pairs}

    def _union(self, field: str) -> set[str]:
        return {entry for m in self.values() for entry in getattr(m, field, None) or ()}

    def _prefixed_set(self, field: str) -> set[str]:
        return {f"{name}.{entry}" for name, m in self.items() for entry in getattr(m, field, None) or ()}

    def _prefixed_dict(self, field: str) -> dict:
        return {f"{n}.{k}": v for n, m in self.items() for k, v in (getattr(m, field, None) or {}).items()}


def check_inputs(names: list[str], input_ids, inputs_embeds, specialist_input_ids, specialist_attention_mask) -> None:
    """Refuses what a fused model cannot read.

    Raises:
        ValueError: Naming the argument and what it must be.
    """
    if inputs_embeds is not None:
        raise ValueError(
            "A fused model reads token ids, because its specialists embed the same token differently, but got "
            "`inputs_embeds`. Pass `input_ids`, or call one specialist: `model.specialist(name)`."
        )
    if input_ids is None:
        raise ValueError("A fused model reads token ids, but `input_ids` is None. Pass a tensor (batch, seq).")
    for key, value in (
        ("specialist_input_ids", specialist_input_ids),
        ("specialist_attention_mask", specialist_attention_mask),
    ):
        if value is not None and (value.ndim != 3 or value.shape[1] != len(names)):
            raise ValueError(
                f"`{key}` holds one row per specialist, in the order {names}, so its shape "
                f"must be (batch, {len(names)}, seq), but it is {tuple(value.shape)}."
            )
    if specialist_input_ids is not None and specialist_input_ids.shape[-1] != input_ids.shape[-1]:
        raise ValueError(
            f"The views of one prompt must be padded on the left to one length, so that the response starts at "
            f"one position, but `input_ids` has {input_ids.shape[-1]} tokens and `specialist_input_ids` "
            f"{specialist_input_ids.shape[-1]}."
        )


def check_checkpointed(cache: Cache) -> None:
    """Refuses a cache where checkpointed layers in training mode would drop it.

    Raises:
        ValueError: With the way out.
    """
    if torch.is_grad_enabled() and cache.get_seq_length():
        raise ValueError(
            f"Gradient checkpointing reads no cache, because layers run twice, but one with {cache.get_seq_length()} tokens "
            f"was given, as prefix tuning does. Train with gradient_checkpointing=False."
        )
    if not torch.is_grad_enabled() and CACHE == OLD_CACHE:
        raise ValueError(
            "Checkpointed layers in training mode drop the cache before transformers 5.24, so that every token would be "
            "generated from the one before it alone. Call `model.eval()` first."
        )


def refuse_router_loss(asked: bool | None, *configs) -> None:
    """Refuses to leave out a loss that was asked for: the one that balances the experts of a mixture of experts.

    Args:
        asked: What was passed as `output_router_logits`.
        *configs: Of the fused model and its specialists.

    Raises:
        ValueError: If it was asked for, by argument or configuration.
    """
    if asked or any(getattr(c, "output_router_logits", False) for c in configs):
        raise ValueError(
            "A fused model's loss is that of its predictions, without one that balances the experts inside a specialist, but "
            "output_router_logits=True asks for that. Set it to False; to balance experts, train the specialist before it is "
            "fused, or alone, `model.specialist(name)`, and fuse it anew."
        )


def refuse_other_specialists(names: list[str], parts: list[str], parameters: list[str], loading_info) -> None:
    """Refuses a checkpoint of other specialists than the configuration names, with one sentence.

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
        # or the library would report on top, and raise an error of its own in place of this one
        for keys in (loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys):
            keys.clear()
        raise ValueError(
            f"A checkpoint must hold the specialists that its configuration names, because gate and head have a part "
            f"for each, but it holds {len(there)} ({there}) and the configuration names {len(names)} ({names})"
            f"{''.join('; ' + shape for shape in shapes)}. Load it with the config.json that was saved with it, or fuse "
            f"anew with `UltraFuserForCausalLM.from_specialists`."
        )


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor is not quantised. That it is floating point torchao's say of themselves, too."""
    ours = type(weight.data).__module__.split(".")[0] == "torch"
    return ours and weight.is_floating_point() and weight.element_size() > 1


def refuse_quantised_head(head: nn.Module | None) -> None:
    """Refuses a head without plain weights. Quantisers leave it alone unless they are told what to leave alone."""
    weight = getattr(head, "weight", None)
    if head is None or (isinstance(weight, Tensor) and is_plain(weight)):
        return
    raise ValueError(
        f"The head of a fused model must have plain weights, because each specialist has columns of its own in it, but "
        f"it became a {type(head).__name__} of {type(weight).__name__}. Add 'lm_head' to the modules that the quantiser "
        f"leaves alone: llm_int8_skip_modules=['lm_head', ...] of BitsAndBytesConfig, modules_to_not_convert=['lm_head', "
        f"...] of others. Without a list they do so by themselves."
    )


def specialist_mask(mask: Tensor | dict[str, Tensor] | None, name: str, config) -> Tensor | dict[str, Tensor] | None:
    """One specialist's part of masks prepared in advance; anything else is for all specialists alike."""
    if not isinstance(mask, dict):
        return mask
    if name in mask:
        return mask[name]
    own = {key.removeprefix(f"{name}/"): m for key, m in mask.items() if key.startswith(f"{name}/")}
    if own:
        return own
    # masks by layer type, as continuous batching prepares them
    return mask if hasattr(config, "layer_types") else mask[specialist_layer_types(config)[0]]


def run_each(
    specialists: Specialists,
    first_layers: list[int],
    input_ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    specialist_input_ids: Tensor | None = None,
    specialist_attention_mask: Tensor | None = None,
    **kwargs,
) -> list[ModelOutput]:
    """Runs the specialists one after another, each on its part of the cache. Returns the output of each."""
    paged = kwargs.pop("cache", None)
    outputs = []
    for k, (name, specialist) in enumerate(specialists.items()):
        start, length = first_layers[k], first_layers[k + 1] - first_layers[k]
        ids, mask, positions = input_ids, specialist_mask(attention_mask, name, specialist.config), position_ids
        if specialist_input_ids is not None:
            ids = specialist_input_ids[:, k]
        if specialist_attention_mask is not None:
            mask = specialist_attention_mask[:, k]
            positions = positions_of(mask, ids.shape[-1])
        own = {} if past_key_values is None else {CACHE: SpecialistCache(past_key_values, start, length)}
        if paged is not None:
            own["cache"] = paged_window(paged, start)
        outputs.append(run(specialist, input_ids=ids, attention_mask=mask, position_ids=positions, **own, **kwargs))
    return outputs


def run(backbone: PreTrainedModel, **inputs) -> ModelOutput:
    """Runs a backbone; without autograd if that would only store activations that no gradient needs."""
    frozen = torch.is_grad_enabled() and not any(p.requires_grad for p in backbone.parameters())
    if frozen and isinstance(inputs.get(CACHE), Cache):
        # prefix tuning trains keys and values
        kept = (getattr(layer, "keys", None) for layer in inputs[CACHE].layers)
        frozen = not any(keys is not None and keys.requires_grad for keys in kept)
    with torch.no_grad() if frozen else nullcontext():
        return backbone(return_dict=True, **inputs)


def positions_of(mask: Tensor, seq: int) -> Tensor:
    """Positions of the last tokens under a mask. Shape (batch, seq)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -seq:]


def end_to_end(outputs: list[ModelOutput], field: str, *last: Tensor) -> tuple[Tensor, ...] | None:
    """A field of all specialists' outputs, one after another, and `last`; or None if one lacks it."""
    values = [o.get(field) for o in outputs]
    return None if any(v is None for v in values) else (*(t for v in values for t in v), *last)


def selected(states: tuple[Tensor, ...] | None, positions: bool | int | list[int] | None) -> tuple | None:
    """Keeps the states at these positions, counted over all specialists, as the library does for one model."""
    if states is None or positions is None or isinstance(positions, bool):
        return states
    positions = [positions] if isinstance(positions, int) else positions
    kept = {i % len(states) for i in positions if -len(states) <= i < len(states)}
    return tuple(state if i in kept else None for i, state in enumerate(states))
