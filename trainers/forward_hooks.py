"""Forward passes beside training: what is collected from one that is made anyway, and those of a model that is not trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_ultrafuser.families_ultrafuser import soft_cap

from .compat import whole_head
from .heads.chunks import specialist_log_probs


@contextmanager
def capture(fused: PreTrainedModel, *, own: bool = False, hidden: bool = False) -> Iterator[dict]:
    """Collects per-token scores and gate weights of the forward pass within it.

    Yields a dict with `scores`, `gate_weights` and `scales`, and what is asked for: `hidden_states` and `evidence`,
    `last_hidden_state`.

    Args:
        fused: The fused model, not wrapped.
        own: Whether to keep every specialist's last hidden state.
        hidden: Whether to keep the fused one, which the head reads.
    """
    seen: dict = {}

    def scores_of(_, __, output):
        if hasattr(output, "label_mask"):
            seen["scores"] = output

    def gate_of(_, inputs, output):
        seen["gate_weights"], seen["scales"], seen["evidence"] = output.weights, output.scales, inputs[1:]
        if own:
            # from a cache no rule mixes states; where one does, it comes after this
            seen["hidden_states"] = list(inputs[0])

    def states_of(_, inputs, output):
        if own:
            seen["hidden_states"] = [state.detach() for state in inputs[0]]
        if hidden:
            seen["last_hidden_state"] = output

    with (
        fused.register_forward_hook(scores_of),
        fused.model.fusion_gate.register_forward_hook(gate_of),
        # whichever way the specialists run, the fusion rule mixes the last hidden state of each
        fused.model.fusion_rule.register_forward_hook(states_of),
    ):
        yield seen


@contextmanager
def capture_single(model: PreTrainedModel, *, own: bool = False, hidden: bool = False) -> Iterator[dict]:
    """Collects the same of a single model: no gate weights, and no specialists' states.

    Args:
        model: The model, not wrapped.
        own: Not there.
        hidden: Whether to keep the last hidden state, which the head reads.
    """
    seen: dict = {}

    def scores_of(_, __, output):
        if hasattr(output, "label_mask"):
            batch, predicted = output.label_mask.shape
            seen["scores"] = output
            seen["gate_weights"], seen["scales"] = output.log_probs.new_zeros(batch, predicted + 1, 0), None

    def states_of(_, __, output):
        if hidden:
            seen["last_hidden_state"] = output[0]

    with model.register_forward_hook(scores_of), model.base_model.register_forward_hook(states_of):
        yield seen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off within it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def own_log_probs(stage, seen: dict, labels: Tensor, domain: Tensor) -> Tensor:
    """Returns the log-probabilities of the labels under each domain's own specialist, from its last hidden states.

    Args:
        stage: The trainer. Its fused model and the index of each domain's own specialist are read.
        seen: As `capture` collected it, with `hidden_states`.
        labels: As the model takes them. Shape (batch, seq).
        domain: Domain of each label. Shape (batch, seq - 1).

    Returns:
        Log-probabilities, 0 where nothing is supervised. Shape (batch, seq - 1).
    """
    weight, columns, mask = whole_head(stage.fused), stage.fused.head_columns(), seen["scores"].label_mask
    log_probs = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for d, k in enumerate(stage.own_specialists):
        chosen = mask & (domain == d)
        head, cap = weight[:, columns[k]], soft_cap(stage.fused.config.specialists[k])
        states, targets = seen["hidden_states"][k][:, :-1][chosen], labels[:, 1:][chosen]
        log_probs[chosen] = specialist_log_probs(states, head, targets, cap).to(log_probs.dtype)
    return log_probs


@torch.no_grad()
def best_specialists(stage, seen: dict, labels: Tensor) -> Tensor:
    """Returns which specialist holds each label likeliest, from the specialists' last hidden states.

    Args:
        stage: The trainer. Its fused model is read.
        seen: As `capture` collected it, with `hidden_states`.
        labels: As the model takes them. Shape (batch, seq).

    Returns:
        Index of the specialist, the first of several, 0 where nothing is supervised. Shape (batch, seq - 1).
    """
    weight, mask = whole_head(stage.fused), seen["scores"].label_mask
    targets, found = labels[:, 1:][mask].to(weight.device), []
    parts = zip(seen["hidden_states"], stage.fused.head_columns(), stage.fused.config.specialists, strict=True)
    for states, columns, config in parts:
        found.append(specialist_log_probs(states[:, :-1][mask], weight[:, columns], targets, soft_cap(config)))
    best = torch.stack(found).argmax(0)
    return torch.zeros(mask.shape, dtype=best.dtype, device=best.device).masked_scatter(mask, best)
