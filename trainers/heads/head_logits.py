"""Losses of the "logits" rule: one wide linear head.

On the gate-scaled states it is a mixture of probabilities with one specialist of weight 1. Where only the gate learns, the
gradient in w_k is z_k(y) - E_p[z_k], from the logits z_k that are there already: no product with the head on the way back.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling_ultrafuser.families_ultrafuser import side_by_side, soft_cap
from modeling_ultrafuser.readers_ultrafuser import state_widths

from . import chunks
from .head_base import Head, log_of
from .head_probabilities import Mixture
from .kept_base import Kept
from .kept_top import TopKept


class LogitsHead(Head):
    """Scores labels under a mixture of logits.

    Mixtures of logits are in the states already, so that the gate learns through them, or, with `gate_only`, through the
    gate weights. States that are summed, of adapters of one base, are one product with the head either way.
    """

    kept = {"hidden": Kept, "top": TopKept}

    def factors(self, gate_weights: Tensor, logit_scales: Tensor | None) -> Tensor:
        return self.rule.factors(gate_weights, logit_scales)

    def score(self, states, gate_weights, head, targets, *, gate_only=False, chunk=None) -> tuple[Tensor, ...]:
        log_weights, widths = log_of(gate_weights), state_widths(self.config)
        chunk, cap = chunk or chunks.chunk_size(states), soft_cap(self.config)
        # signed weights have no logarithms
        if gate_only and self.config.signed_weights is None and states.shape[1] == sum(widths):
            return _GateOfLogits.apply(log_weights, states.detach(), head.detach(), targets, widths, cap, chunk)
        alone = log_weights.new_zeros(len(states), 1)
        return Mixture.apply(states, alone, head, targets, [head.shape[1]], [cap], chunk)


class _GateOfLogits(torch.autograd.Function):
    """log softmax(sum_k x_k W_k^T)[y] for x_k = w_k h_k, as a function of log w_k alone."""

    @staticmethod
    def forward(ctx, log_weights, states, head, targets, widths, cap, chunk):
        new = functools.partial(torch.empty, dtype=chunks.sum_type(states), device=states.device)
        tokens, columns, dtype = len(targets), side_by_side(widths), chunks.product_type(states, head)
        states, head = states.to(dtype), head.to(dtype)
        log_probs, entropy, is_top1 = new(tokens), new(tokens), new(tokens, dtype=torch.bool)
        ctx.of_weights = new(tokens, len(widths))
        buffer = new(min(chunk, tokens), len(widths), len(head))
        for rows in chunks.slices(tokens, chunk):
            own = buffer[: len(targets[rows])]  # w_k z_k
            for k, c in enumerate(columns):
                chunks.multiply(states[rows, c], head[:, c].T, own[:, k])
            for part in chunks.slices(len(own), chunks.rows_in_cache(own)):
                place, one = slice(rows.start + part.start, rows.start + part.stop), torch.ones_like(own[part, :1, 0])
                y, words = targets[place, None], own[part].sum(1)
                log_p, slope = chunks.softmax_(words, y, cap)
                log_probs[place] = log_p[:, 0]
                entropy[place], is_top1[place] = chunks.entropy_and_top1([words], one, y)
                words.neg_().scatter_add_(-1, y, one)
                if slope is not None:
                    words *= slope
                ctx.of_weights[place] = torch.bmm(own[part], words[..., None])[..., 0]
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        return ctx.of_weights * gradient[:, None], None, None, None, None, None, None
