"""Hooks on a forward pass: they collect scores, gate weights and hidden states, and keep a sharded head whole."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_ultrafuser.families_ultrafuser import soft_cap

from .chunked import specialist_log_probs


@contextmanager
def capture(fused: PreTrainedModel, *, own: bool = False, hidden: bool = False) -> Iterator[dict]:
    """Collects per-token scores and gate weights of the next forward pass, without a pass of its own.

    Args:
        fused: The fused model, not wrapped.
        own: Whether to keep every specialist's last hidden state, and the evidence that a gate reads beside them.
        hidden: Whether to keep the backbone's.
    """
    seen: dict = {}

    def scores_of(_, __, output):
        if hasattr(output, "label_mask"):
            seen["scores"] = output

    def gate_of(_, __, output):
        seen["gate_weights"] = output.gate_weights
        if hidden:
            seen["last_hidden_state"] = output[0]

    def states_of(_, inputs):
        seen["hidden_states"], seen["evidence"] = [state.detach() for state in inputs[0]], inputs[1:]

    handles = [
        fused.register_forward_hook(scores_of),
        fused.model.register_forward_hook(gate_of),
    ]
    if own:
        # whichever way the specialists run, the gate reads the last hidden state of each
        handles.append(fused.model.fusion_gate.register_forward_pre_hook(states_of))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def own_log_probs(
    fused: PreTrainedModel,
    own_specialists: list[int],
    hidden_states: list[Tensor],
    labels: Tensor,
    domain: Tensor,
    mask: Tensor,
) -> Tensor:
    """What each domain's own specialist gives the labels: its head on states that are there already.

    Args:
        fused: The fused model, not wrapped.
        own_specialists: Place of each domain's own specialist. Length: domains.
        hidden_states: Each specialist's last hidden state. Shapes (batch, seq, hidden).
        labels: As the model takes them. Shape (batch, seq).
        domain: Domain of each label. Shape (batch, seq - 1).
        mask: Whether a label is supervised. Shape (batch, seq - 1).

    Returns:
        Log-probabilities, 0 where nothing is supervised. Shape (batch, seq - 1).
    """
    weight = _whole_head(fused)
    found = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    config = fused.config
    columns = fused.head_columns()
    for d, k in enumerate(own_specialists):
        chosen = mask & (domain == d)
        head, cap = weight[:, columns[k]], soft_cap(config.specialists[k])
        states, targets = hidden_states[k][:, :-1][chosen], labels[:, 1:][chosen]
        found[chosen] = specialist_log_probs(states, head, targets, cap).to(found.dtype)
    return found


def keep_head_whole(fused: PreTrainedModel) -> None:
    """Lets FSDP2 make the head whole by its own means before anything multiplies by its weight.

    TRL's head does so with `full_tensor()`, whose backward pass gives each process the gradient of its own batch.
    """

    def gather(*_) -> None:
        head = fused.get_output_embeddings()
        if hasattr(head, "unshard"):
            head.unshard()

    def scatter(*_) -> None:
        head = fused.get_output_embeddings()
        if hasattr(head, "reshard") and not torch.is_grad_enabled():  # else the backward pass does
            head.reshard()

    if fused.model.fusion_gate.reads_past:
        # the backbone asks it for evidence
        fused.model.register_forward_pre_hook(gather)
    fused.model.register_forward_hook(gather)
    fused.register_forward_hook(scatter)


def _whole_head(fused: PreTrainedModel) -> Tensor:
    """The head's weight, from all processes where each holds a part. Every process must ask at the same time."""
    weight = fused.lm_head.weight
    if hasattr(weight, "full_tensor"):  # FSDP2
        return weight.full_tensor()
    if hasattr(weight, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight
