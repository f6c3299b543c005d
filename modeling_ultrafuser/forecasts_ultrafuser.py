"""Sums of log-probabilities over the past, and fixed-share forecasters of them, token by token."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .gate_base_ultrafuser import Evidence


# so many tokens are run one after another
SHORT = 8


def accumulated(
    log_probs: Tensor, follows: Tensor, counts: Tensor, wanted: Evidence, before: Tensor | None = None
) -> Tensor:
    """Sums up log-probabilities over the past, token by token.

    For each decay c, the decayed sum s_t = c s_(t-1) + l_t of each specialist's log-probabilities l. For each switch
    probability a, log weights of the fixed-share forecaster (Herbster and Warmuth, "Tracking the best expert", 1998): the
    posterior that a specialist is the best one for what comes next, if the best one is drawn anew after a token with
    probability a, evenly among the N:

        v_t,k = w_(t-1),k exp(l_t,k) / sum_j w_(t-1),j exp(l_t,j)        (loss update)
        w_t,k = (1 - a) v_t,k + a / N                                    (share update, their alpha being a (N - 1) / N)

    Args:
        log_probs: Of the tokens. Shape (batch, seq, specialists).
        follows: Whether a token follows the one before it; where not, all starts anew. Shape (batch, seq).
        counts: Whether its log-probabilities count. Shape (batch, seq).
        wanted: Decays and switch probabilities.
        before: What there was. Shape (batch, specialists, numbers). Default: nothing, that is sums of 0, equal weights.

    Returns:
        A number for each decay, then for each switch probability. Shape (batch, seq, specialists, numbers).
    """
    (batch, seq, number), like = log_probs.shape, {"dtype": log_probs.dtype, "device": log_probs.device}
    decays, switches = (torch.tensor(values, **like) for values in wanted)
    even = torch.full((batch, number, len(switches)), -math.log(number), **like)
    if before is None:
        before = torch.cat([even.new_zeros(batch, number, len(decays)), even], -1)
    sums, weights = before.split([len(decays), len(switches)], -1)
    # a long text is cut into stretches that are run side by side, then one after another from where the last one ended
    size = seq if seq <= SHORT else math.isqrt(seq - 1) + 1
    stretches = -(-seq // size)
    missing = stretches * size - seq
    follows, counts = (
        F.pad(t, (0, missing), value=value).view(batch, stretches, size, 1, 1, 1)
        for t, value in ((follows, True), (counts, False))
    )
    log_probs = F.pad(log_probs, (0, 0, 0, missing)).view(batch, stretches, size, 1, number, 1)
    found_sums = _decayed(log_probs, follows, counts, decays, sums)
    found_weights = _forecasts(log_probs, follows, counts, switches, weights)
    return torch.cat([found_sums, found_weights], -1)[:, :seq]


def _decayed(log_probs: Tensor, follows: Tensor, counts: Tensor, decays: Tensor, start: Tensor) -> Tensor:
    """The sums of `accumulated`. Shape (batch, stretches * size, specialists, decays)."""
    sums = torch.zeros_like(log_probs[:, :, 0] * decays)
    kept = torch.ones_like(sums)  # of what there was when the stretch began
    nothing, steps = torch.zeros_like(sums), []
    for t in range(log_probs.shape[2]):
        follow, count = follows[:, :, t], counts[:, :, t]
        sums = torch.where(follow, torch.where(count, sums * decays + log_probs[:, :, t], sums), nothing)
        kept = torch.where(follow, torch.where(count, kept * decays, kept), nothing)
        steps.append((sums, kept))
    sums, kept = (torch.stack(part, 2).squeeze(3) for part in zip(*steps, strict=True))
    found = []
    for c in range(sums.shape[1]):
        found.append(sums[:, c] + kept[:, c] * start[:, None])
        start = found[-1][:, -1]
    return torch.cat(found, 1)


def _forecasts(log_probs: Tensor, follows: Tensor, counts: Tensor, switches: Tensor, start: Tensor) -> Tensor:
    """The log weights of `accumulated`. Shape (batch, stretches * size, specialists, switches).

    Weights are linear in those that a stretch begins with, but for their sum. So each stretch is run from every
    specialist alone, and with what likelihood it came that far tells how much each of these runs counts.
    """
    number, (batch, stretches, size) = log_probs.shape[4], log_probs.shape[:3]
    # only what one is likelier than the other by tells
    log_probs = log_probs - log_probs.amax(4, keepdim=True)
    stay, share = torch.log1p(-switches), switches.log() - math.log(number)
    alone = torch.eye(number, dtype=start.dtype, device=start.device).log()[..., None]
    weights = start[:, None, None] if stretches == 1 else alone.expand(batch, stretches, -1, -1, len(switches))
    mass = torch.zeros_like(weights[..., :1, :])
    even, nothing, steps = torch.full_like(weights, -math.log(number)), torch.zeros_like(mass), []
    for t in range(size):
        follow, count = follows[:, :, t], counts[:, :, t]
        joint = weights + log_probs[:, :, t]
        total = joint.logsumexp(-2, keepdim=True)
        new = torch.logaddexp(joint - total + stay, share)
        weights = torch.where(follow, torch.where(count, new, weights), even)
        mass = torch.where(follow, torch.where(count, mass + total, mass), nothing)
        steps.append((weights, mass))
    weights, mass = (torch.stack(part, 2) for part in zip(*steps, strict=True))
    if stretches == 1:
        return weights[:, 0, :, 0]
    found = []
    for c in range(stretches):
        found.append((start[:, None, :, None] + mass[:, c] + weights[:, c]).logsumexp(2).log_softmax(2))
        start = found[-1][:, -1]
    return torch.cat(found, 1)
