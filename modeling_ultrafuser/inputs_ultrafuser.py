"""Inputs of a fused model, and those that it rejects."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .compat_ultrafuser import CACHE, OLD_CACHE


NO_ROUTER_LOSS = (
    "output_router_logits=True of its configuration is set to False, because a fused model's loss has no part that balances "
    "the experts inside a specialist."
)


class Tokens(NamedTuple):
    """Tokens to read, the same for all specialists or in each one's own words. See `UltraFuserModel.forward`."""

    input_ids: Tensor | None
    attention_mask: Tensor | dict[str, Tensor] | None = None
    position_ids: Tensor | None = None
    specialist_input_ids: Tensor | None = None
    specialist_attention_mask: Tensor | None = None


def view(tokens: Tokens, k: int) -> Tokens:
    """Returns what specialist k reads."""
    ids, mask, positions, all_ids, all_masks = tokens
    if all_ids is not None:
        ids = all_ids[:, k]
    if all_masks is not None:
        mask = all_masks[:, k]
        positions = positions_of(mask, ids.shape[-1])
    return Tokens(ids, mask, positions)


def positions_of(mask: Tensor, seq: int) -> Tensor:
    """Positions of the last tokens under a mask. Shape (batch, seq)."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -seq:]


def check_inputs(names: list[str], tokens: Tokens, inputs_embeds: Tensor | None) -> None:
    """Rejects what a fused model cannot read.

    Raises:
        ValueError: Naming the argument and what it must be.
    """
    input_ids, views = tokens.input_ids, tokens.specialist_input_ids
    if inputs_embeds is not None:
        raise ValueError(
            "A fused model reads token ids, because its specialists embed the same token differently, but got "
            "`inputs_embeds`. Pass `input_ids`, or call one specialist: `model.specialist(name)`."
        )
    if input_ids is None:
        raise ValueError("A fused model reads token ids, but `input_ids` is None. Pass a tensor (batch, seq).")
    for key in ("specialist_input_ids", "specialist_attention_mask"):
        value = getattr(tokens, key)
        if value is not None and (value.ndim != 3 or value.shape[1] != len(names)):
            raise ValueError(
                f"`{key}` holds one row per specialist, in the order {names}, so its shape "
                f"must be (batch, {len(names)}, seq), but it is {tuple(value.shape)}."
            )
    if views is not None and views.shape[-1] != input_ids.shape[-1]:
        raise ValueError(
            f"The views of one prompt must be padded on the left to one length, so that the response starts at "
            f"one position, but `input_ids` has {input_ids.shape[-1]} tokens and `specialist_input_ids` "
            f"{views.shape[-1]}."
        )


def checked_prior(gate_prior: Tensor | None, names: list[str], input_ids: Tensor) -> dict[str, Tensor]:
    """Returns a prior as the argument of a gate, or nothing.

    Raises:
        ValueError: If it cannot weigh the specialists.
    """
    if gate_prior is None:
        return {}
    shape = (input_ids.shape[0], len(names))
    if not isinstance(gate_prior, Tensor) or tuple(gate_prior.shape) != shape:
        given = tuple(gate_prior.shape) if isinstance(gate_prior, Tensor) else f"a {type(gate_prior).__name__}"
        raise ValueError(
            f"`gate_prior` is a tensor with one weight for each text and specialist, in the order {names}, so its shape must be "
            f"{shape}, but it is {given}."
        )
    # in the type of gate weights, in which a tiny number may be 0 and a large one infinite
    prior = gate_prior.float()
    valid = (prior >= 0) & prior.isfinite()
    # a compiled step cannot look at values: generating has looked before
    if not torch.compiler.is_compiling() and not (valid.all() and prior.sum(-1).all()):
        raise ValueError(
            f"`gate_prior` multiplies the gate's weights, so it must be finite, not negative, and positive for one specialist of "
            f"each text, in float32, but it is {gate_prior.tolist()!s:.200}. A one for each specialist changes nothing."
        )
    return {"prior": prior}


def check_checkpointed(cache: Cache) -> None:
    """Rejects a cache where checkpointed layers in training mode would drop it.

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
    """Rejects to leave out a loss that was asked for: the one that balances the experts of a mixture of experts.

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
