"""Divergences of a student's predictions from a teacher's, token by token."""

import inspect
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .heads.chunks import chunk_size, slices


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Returns the generalised Jensen-Shannon divergence (Agarwal et al., 2024, arXiv 2306.13649), as TRL defines it.

    With m = beta teacher + (1 - beta) student it is beta KL(teacher, m) + (1 - beta) KL(student, m); for beta of 0 and 1
    its limits up to a factor, KL(teacher, student) and KL(student, teacher).

    Args:
        student: Log-probabilities. Shape (tokens, vocab).
        teacher: Log-probabilities. Shape (tokens, vocab).
        beta: Between 0 and 1.

    Returns:
        In nats. Shape (tokens,).
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def token_divergences(
    student: Tensor, teacher: Tensor, targets: Tensor, *, beta: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compares predictions a few positions at a time; the backward pass computes them again.

    Args:
        student: Logits, through which gradients flow. Shape (tokens, vocab).
        teacher: Logits or log-probabilities. Shape (tokens, vocab).
        targets: The tokens that follow. Shape (tokens,).
        beta: See `divergence`.
        temperature: Divides both logits.

    Returns:
        Divergences; log-probabilities of `targets`, the teacher's minus the student's; and the student's entropies. In
        nats, the last two without gradient. Shapes (tokens,).
    """

    def compared(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        own, its = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
        seen = own.detach()
        gap = (its - seen).gather(-1, targets[:, None])[:, 0]
        return divergence(own, its, beta), gap, torch.special.entr(seen.exp()).sum(-1)

    rows = slices(len(targets), chunk_size(student)) or [slice(0, 0)]
    parts = (checkpoint(compared, student[r], teacher[r], targets[r], use_reentrant=False) for r in rows)
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def next_token_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, start: int) -> Tensor:
    """Returns the logits of the tokens behind position `start`, which the position before each predicts.

    Args:
        model: Any causal language model.
        input_ids: Padded on the right, so that positions are those of generation. Shape (batch, seq).
        attention_mask: Shape (batch, seq).
        start: From this position on logits are needed.

    Returns:
        Shape (batch, seq - start - 1, vocab).
    """
    kept = input_ids.shape[1] - start
    takes_kept = "logits_to_keep" in inspect.signature(model.forward).parameters
    chosen = {"logits_to_keep": kept} if takes_kept else {}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **chosen).logits
    return logits[:, -kept:-1]
