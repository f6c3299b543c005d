"""Collects scores, gate weights and hidden states from a forward pass that is made anyway."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_ultrafuser.families_ultrafuser import soft_cap

from .chunked import specialist_log_probs
from .compat import whole_head


@contextmanager
def capture(fused: PreTrainedModel, *, own: bool = False, hidden: bool = False) -> Iterator[dict]:
    """Collects per-token scores and gate weights of the forward pass within it.

    Yields a dict with `scores` and `gate_weights`, and what is asked for: `hidden_states` and `evidence`,
    `last_hidden_state`.

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
    """Returns the log-probabilities of the labels under each domain's own specialist, from its last hidden states.

    Args:
        fused: The fused model, not wrapped.
        own_specialists: Index of each domain's own specialist. Length: domains.
        hidden_states: Each specialist's last hidden state. Shapes (batch, seq, hidden).
        labels: As the model takes them. Shape (batch, seq).
        domain: Domain of each label. Shape (batch, seq - 1).
        mask: Whether a label is supervised. Shape (batch, seq - 1).

    Returns:
        Log-probabilities, 0 where nothing is supervised. Shape (batch, seq - 1).
    """
    weight = whole_head(fused)
    log_probs = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    config = fused.config
    columns = fused.head_columns()
    for d, k in enumerate(own_specialists):
        chosen = mask & (domain == d)
        head, cap = weight[:, columns[k]], soft_cap(config.specialists[k])
        states, targets = hidden_states[k][:, :-1][chosen], labels[:, 1:][chosen]
        log_probs[chosen] = specialist_log_probs(states, head, targets, cap).to(log_probs.dtype)
    return log_probs
