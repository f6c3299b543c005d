"""Restores what families keep on their `...ForCausalLM` classes, of which a fused model holds only the backbones.

Generation calls some of it by name. Everything that a causal class defines otherwise than its backbone stands in one of
the tables here with the reason why it has its effect in a fused model; a specialist with anything else is refused.
"""

import inspect

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .compat_ultrafuser import kept_in_float32
from .refusals_ultrafuser import Refusal


# what causal classes define, of any family
HANDLED = {
    "forward": "fusing compares the logits of backbone and head with its own",
    "create_masks_for_generate": "called for each specialist, see `masks_for_generate`",
    "_is_stateful": "asked of the causal class, see `causal_class`",
    "_keep_in_fp32_modules_strict": "a head in float32 is refused in 16 bits, see `check_head_dtype`",
    "_tied_weights_keys": "the wide head holds a copy of each head",
    "_tp_plan": "plans its head; the wide head has a plan of its own",
    "_fsdp_plan": "plans its head; the wide head has a plan of its own",
    "_pp_plan": "plans its head; a fused model offers no pipeline",
    "get_input_embeddings": "leads to the backbone's own",
    "set_input_embeddings": "leads to the backbone's own",
    "get_output_embeddings": "leads to its head",
    "set_output_embeddings": "leads to its head",
    "_keys_to_ignore_on_load_unexpected": "the specialist is loaded with its own class",
    "_no_split_modules": "collected from the backbones",
    "_can_record_outputs": "backbones record theirs",
    "base_model_prefix": "where its own class keeps the backbone",
    "input_modalities": "text alone is read",
}
# families whose causal class prepares the inputs of a step of generation in its own way
PREPARED = {
    # starts over when the factors of rotation change, see `starts_over`
    *("phi3", "phimoe", "phi4_multimodal"),
    # asks for as many logits as `generate` does
    *("bamba", "falcon_h1", "nemotron_h", "zamba", "zamba2"),
}


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a specialist with its head, by the configuration of its backbone."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def overridden(causal: type, backbone: type) -> set[str]:
    """Methods of its own, and names of the library's, that a causal class defines otherwise than its backbone does."""
    library = (PreTrainedModel, GenerationMixin)
    inherited = {c for base in library for c in base.__mro__}
    names = {n for c in causal.__mro__ if c not in inherited for n in vars(c) if not n.startswith("__")}

    def differs(name: str) -> bool:
        its, other = (inspect.getattr_static(c, name, None) for c in (causal, backbone))
        method = isinstance(its, staticmethod | classmethod | property) or inspect.isfunction(its)
        if not method and not any(hasattr(c, name) for c in library):
            return False  # what the library has noted down about the class
        return its is not other and not (isinstance(its, str | list | dict | tuple | set | bool) and its == other)

    return {name for name in names - {"config_class"} if differs(name)}


def check_causal_class(name: str, config: PreTrainedConfig, backbone: type) -> None:
    """Refuses a specialist whose causal class does what a fused model would lose.

    Raises:
        ValueError: Naming the specialist, its class and what that defines.
    """
    causal = causal_class(config)
    lost = overridden(causal, backbone) - set(HANDLED)
    if config.model_type in PREPARED:
        lost.discard("prepare_inputs_for_generation")
    if lost:
        raise Refusal(
            f"{causal.__name__} of {name!r} has {sorted(lost)} of its own",
            "A fused model holds the backbones of its specialists, so what a family does elsewhere must be known here",
            "Fuse a model of another family.",
            about="architecture",
        )


def check_head_dtype(name: str, config: PreTrainedConfig, backbone: type, dtype: torch.dtype | None) -> None:
    """Refuses to round a head that its family keeps in float32.

    Raises:
        ValueError: Naming the specialist and its class.
    """
    causal = causal_class(config)
    kept = [kept_in_float32(c) for c in (causal, backbone)]
    if kept[0] - kept[1] and dtype is not None and dtype.itemsize < 4:
        raise Refusal(
            f"{causal.__name__} of {name!r} keeps {sorted(kept[0] - kept[1])} in float32",
            f"The fused head is {str(dtype).removeprefix('torch.')}, like the specialists",
            "Fuse with dtype='float32'.",
            about="architecture",
        )


def masks_for_generate(backbone: PreTrainedModel, *args, **kwargs) -> Tensor | dict[str, Tensor]:
    """Makes a specialist's masks for static caches, as its causal class does, its backbone or transformers."""
    for owner in (causal_class(backbone.config), type(backbone)):
        create = inspect.getattr_static(owner, "create_masks_for_generate", None)
        if create is not None:
            return create.__get__(backbone, type(backbone))(backbone.config, *args, **kwargs)
    return create_masks_for_generate(backbone.config, *args, **kwargs)


def switching_lengths(config: PreTrainedConfig) -> set[int]:
    """Lengths beyond which all keys of a text are rotated by other factors than up to there (longrope)."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    return {r["original_max_position_embeddings"] for r in each if r.get("rope_type") == "longrope"}


def starts_over(lengths: set[int], past: int, mask: Tensor | None, length: int) -> bool:
    """Returns whether cached keys were rotated by other factors than the longer text needs, and must be recomputed.

    Args:
        lengths: See `switching_lengths`.
        past: Tokens in the cache, padding included.
        mask: Of the whole text. Shape (batch, padded length).
        length: Of the whole text, the longest of the batch, without padding.
    """
    if not lengths or not past:
        return False
    # the library decides by the longest text of a batch
    before = past if mask is None else mask[:, :past].sum(-1).max()
    return any(before <= switch < length for switch in lengths)


def tokens_before_switch(lengths: set[int], length: int) -> int | None:
    """Counts the tokens that a text can grow by until its rotation factors change; None if they never do."""
    return min((switch - length for switch in lengths if switch >= length), default=None)
