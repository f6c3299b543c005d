"""Losses of the "probabilities" rule, with gradients formed on the way forward.

Positions share nothing but the head, so no (tokens, vocab) tensor is needed, let alone one for each specialist. With
p_k = softmax(h_k W_k^T), a label y and the gate weights w_k, log p(y) = log sum_k w_k p_k(y). Given each specialist's
share of it, r_k = w_k p_k(y) / p(y), the gradient is r_k (onehot(y) - p_k) in k's logits and r_k in log w_k.

Forming gradients on the way forward is the idea of Liger's kernels (Hsu et al., 2024, arXiv 2410.10989).
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling_ultrafuser.families_ultrafuser import side_by_side, soft_cap
from modeling_ultrafuser.readers_ultrafuser import state_widths

from . import chunks
from .head_base import Head, log_of
from .kept_base import Kept
from .kept_log_probs import LogProbsKept


class ProbabilitiesHead(Head):
    """Scores labels under a mixture of probabilities. A cache keeps one number of each specialist and token."""

    kept = {"log_probs": LogProbsKept, "hidden": Kept}

    def score(self, states, gate_weights, head, targets, *, gate_only=False, chunk=None) -> tuple[Tensor, ...]:
        widths, caps = state_widths(self.config), [soft_cap(c) for c in self.config.specialists]
        chunk = chunk or chunks.chunk_size(states)
        return Mixture.apply(states, log_of(gate_weights), head, targets, widths, caps, chunk)


class Mixture(torch.autograd.Function):
    """log sum_k w_k softmax(h_k W_k^T)[y], h_k and W_k being columns of states and head."""

    @staticmethod
    def forward(ctx, states, log_weights, head, targets, widths, caps, chunk):
        ctx.dtype, ctx.settings = chunks.product_type(states, head), (widths, caps, chunk)
        ctx.save_for_backward(states, log_weights, head, targets)
        needs = ctx.needs_input_grad[:3]
        scores, ctx.gradients = _mixture(states, log_weights, head, targets, *ctx.settings, ctx.dtype, needs)
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        states, log_weights, head, targets = ctx.saved_tensors
        (of_states, of_weights, of_head), kept = ctx.gradients, None
        if of_states is not None:
            of_states = (of_states * gradient[:, None]).to(states.dtype)
        if of_weights is not None:
            of_weights = of_weights * gradient[:, None]
        if ctx.needs_input_grad[2]:
            # where all tokens count alike, as in a mean, the sum over them is made already: it is used up, not copied
            if of_head is None or not gradient.eq(gradient[:1]).all():
                needs = (False, False, True)
                inputs = (states, log_weights, head, targets)
                of_head = _mixture(*inputs, *ctx.settings, ctx.dtype, needs, gradient)[1][2]
            elif len(gradient):
                of_head.mul_(gradient[0])
            ctx.gradients, kept = (ctx.gradients[0], ctx.gradients[1], None), of_head.to(head.dtype)
        return of_states, of_weights, kept, None, None, None, None


def _mixture(states, log_weights, head, targets, widths, caps, chunk, dtype, needs, counts=None):
    """Scores, and gradients of the sum of log-probabilities in states, log weights and head where needed.

    `counts` says how much each token counts in the head's gradient. Default: 1.
    """
    new = functools.partial(torch.empty, dtype=chunks.sum_type(states), device=states.device)
    tokens, columns = len(targets), side_by_side(widths)
    # of a head that all share, everyone's columns are all
    of_heads = columns if head.shape[1] == sum(widths) else [slice(None)] * len(widths)
    states, weight = states.detach().to(dtype), head.detach().to(dtype)
    log_probs, entropy, is_top1 = new(tokens), new(tokens), new(tokens, dtype=torch.bool)
    of_states = new(states.shape) if needs[0] else None
    of_weights = new(tokens, len(widths)) if needs[1] else None
    of_head = new(head.shape).zero_() if needs[2] else None
    buffers = [new(min(chunk, tokens), len(head)) for _ in widths]
    for rows in chunks.slices(tokens, chunk):
        y = targets[rows, None]
        words = [buffer[: len(y)] for buffer in buffers]
        slopes, own = [], []
        for k, c in enumerate(columns):
            chunks.multiply(states[rows, c], weight[:, of_heads[k]].T, words[k])
            log_p, slope = chunks.softmax_(words[k], y, caps[k])
            own.append(log_p)
            slopes.append(slope)
        joint = log_weights[rows] + torch.cat(own, -1)
        log_probs[rows] = joint.logsumexp(-1)
        entropy[rows], is_top1[rows] = chunks.entropy_and_top1(words, log_weights[rows].exp(), y)
        shares = (joint - log_probs[rows, None]).exp()
        if needs[1]:
            of_weights[rows] = shares
        if not needs[0] and not needs[2]:
            continue
        for k, c in enumerate(columns):
            errors = words[k].scatter_add_(-1, y, -torch.ones_like(own[k]))  # p_k - onehot(y)
            if slopes[k] is not None:
                errors *= slopes[k]
            share = shares[:, k, None]
            if needs[0]:
                chunks.multiply(errors, weight[:, of_heads[k]], of_states[rows, c])
                of_states[rows, c] *= -share
            if needs[2]:
                share = share if counts is None else share * counts[rows, None]
                chunks.add_product(of_head[:, of_heads[k]], errors.T, (share * states[rows, c]).to(dtype), -1)
    return (log_probs, entropy, is_top1), (of_states, of_weights, of_head)
