"""Log-probabilities of labels under a fused model, a few positions at a time, with gradients formed on the way forward.

Positions share nothing but the head, so no (tokens, vocab) tensor is needed, let alone one for each specialist. With
p_k = softmax(h_k W_k^T), a label y and the gate weights w_k,

- a mixture of probabilities has log p(y) = log sum_k w_k p_k(y). Given each specialist's share of it,
  r_k = w_k p_k(y) / p(y), the gradient is r_k (onehot(y) - p_k) in k's logits and r_k in log w_k.
- a mixture of logits is one wide linear head on the gate-scaled states: the same with one specialist of weight 1.
- where only the gate learns, a mixture of logits has the gradient z_k(y) - E_p[z_k] in w_k, from the logits z_k that
  are there already: no product with the head on the way back.

Forming gradients on the way forward is the idea of Liger's kernels (Hsu et al., 2024, arXiv 2410.10989).
"""

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from modeling_ultrafuser.families_ultrafuser import soft_cap


# positions whose logits are in memory at once: a processor's caches are small, a GPU's launches cost more than memory
CHUNK = {"cpu": 128}
CHUNK_ELSEWHERE = 1024
# logits that stay in a processor's second-level cache while one function after another is taken of them
CACHED = 2**18


@dataclass
class TokenScores(ModelOutput):
    """What TRL's trainers read from a forward pass with `fused_lm_head=True`. All shapes (batch, seq - 1).

    Attributes:
        log_probs: Log-probability of each next token, 0 where the label is -100.
        entropy: Entropy of each prediction in nats, without gradient.
        is_top1: Whether no token is more likely than the label.
        label_mask: Whether the label is not -100.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None


def add_chunked_head(model: PreTrainedModel) -> None:
    """Lets TRL's trainers score tokens in chunks, after their own head is on the model.

    TRL's head multiplies one hidden state by one matrix: for a mixture of probabilities that is the wrong loss. Where
    it is right it stays on GPUs, for which it is written, and where ZeRO-3 or tensor parallelism hold the head in parts.
    """
    theirs = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or (self.model.fusion_rule.one_head and _is_for_trl(self.get_output_embeddings())):
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        outputs = self.model(*args, **kwargs | {"use_cache": False, "return_dict": True})
        head = self.get_output_embeddings().weight
        targets = labels[:, 1:].to(head.device)
        mask = targets != -100
        learns = [head, *self.model.specialists.parameters()]
        weights = outputs.gate_weights
        if self.model.fusion_rule.one_head:
            weights = self.model.fusion_rule.factors(weights, outputs.logit_scales)
        found = score_tokens(
            self.config,
            outputs[0][:, :-1].to(head.device)[mask],
            weights[:, :-1].to(head.device)[mask],
            head,
            targets[mask],
            gate_only=not any(p.requires_grad for p in learns),
        )
        return scattered(mask, *found)

    model.forward = types.MethodType(forward, model)


def _is_for_trl(head: torch.nn.Module) -> bool:
    # FSDP2 makes the head whole when the backbone has run: see `compat.keep_head_whole`
    in_parts = isinstance(head.weight, DTensor) and not hasattr(head, "unshard")
    return head.weight.device.type != "cpu" or hasattr(head.weight, "ds_id") or in_parts


def scattered(mask: Tensor, log_probs: Tensor, entropy: Tensor, is_top1: Tensor) -> TokenScores:
    """Scores of supervised tokens at their places. A batch without labels still gives a zero that has a gradient."""
    places = (f.new_zeros(mask.shape).masked_scatter(mask, f) for f in (log_probs, entropy, is_top1))
    return TokenScores(*places, label_mask=mask)


def score_tokens(
    config,
    states: Tensor,
    gate_weights: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    gate_only: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores labels under a fused model of either rule.

    Gradients reach states, gate weights and head through the log-probabilities. Mixtures of logits are in the states
    already, so there the gate learns through them, or, with `gate_only`, through the gate weights. States that are
    summed, of adapters of one base, are one product with the head either way.

    Args:
        config: The fused model's. Specialists' widths, the fusion rule and soft caps are read.
        states: What the backbone returns first. Shape (tokens, sum of hidden sizes); (tokens, hidden) if summed.
        gate_weights: Shape (tokens, specialists). Where logits are mixed: times the scale of a calibrated gate.
        head: The wide head's weight. Shape (vocab, sum of hidden sizes); (vocab, hidden) of adapters of one base.
        targets: Labels. Shape (tokens,).
        gate_only: Whether nothing but the gate learns.
        chunk: Positions at once.

    Returns:
        Log-probabilities of the labels, entropies of the predictions in nats, and whether no token is more likely;
        the last two without gradient. Shapes (tokens,).
    """
    chunk = chunk or CHUNK.get(states.device.type, CHUNK_ELSEWHERE)
    # a weight that rounds to 0 has a logarithm without a gradient
    log_weights = gate_weights.clamp(min=torch.finfo(gate_weights.dtype).tiny).log()
    widths = [c.hidden_size for c in config.specialists]
    if config.fusion == "probabilities":
        caps = [soft_cap(c) for c in config.specialists]
        return _Mixture.apply(states, log_weights, head, targets, widths, caps, chunk)
    if gate_only and states.shape[1] == sum(widths):
        return _GateOfLogits.apply(
            log_weights, states.detach(), head.detach(), targets, widths, soft_cap(config), chunk
        )
    alone = log_weights.new_zeros(len(states), 1)
    return _Mixture.apply(states, alone, head, targets, [head.shape[1]], [soft_cap(config)], chunk)


@torch.no_grad()
def specialist_log_probs(states: Tensor, head: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Log-probabilities of labels under one specialist, without gradient.

    Args:
        states: Its last hidden states. Shape (tokens, hidden).
        head: Its columns of the wide head's weight. Shape (vocab, hidden).
        targets: Labels. Shape (tokens,).
        cap: What bounds its logits, or None.

    Returns:
        Shape (tokens,).
    """
    chunk, dtype = CHUNK.get(states.device.type, CHUNK_ELSEWHERE), _product_type(states, head)
    states, weight = states.to(dtype), head.to(dtype)
    found = states.new_empty(len(targets), dtype=_sum_type(states))
    buffer = found.new_empty(min(chunk, len(targets)), len(head))
    for rows in _slices(len(targets), chunk):
        words = buffer[: len(targets[rows])]
        _multiply(states[rows], weight.T, words)
        found[rows] = _softmax_(words, targets[rows, None], cap)[0][:, 0]
    return found


class _Mixture(torch.autograd.Function):
    """log sum_k w_k softmax(h_k W_k^T)[y], h_k and W_k being columns of states and head."""

    @staticmethod
    def forward(ctx, states, log_weights, head, targets, widths, caps, chunk):
        ctx.dtype, ctx.settings = _product_type(states, head), (widths, caps, chunk)
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
    new = functools.partial(torch.empty, dtype=_sum_type(states), device=states.device)
    tokens, columns = len(targets), _columns(widths)
    # of a head that all share, everyone's columns are all
    of_heads = columns if head.shape[1] == sum(widths) else [slice(None)] * len(widths)
    states, weight = states.detach().to(dtype), head.detach().to(dtype)
    log_probs, entropy, is_top1 = new(tokens), new(tokens), new(tokens, dtype=torch.bool)
    of_states = new(states.shape) if needs[0] else None
    of_weights = new(tokens, len(widths)) if needs[1] else None
    of_head = new(head.shape).zero_() if needs[2] else None
    buffers = [new(min(chunk, tokens), len(head)) for _ in widths]
    for rows in _slices(tokens, chunk):
        y = targets[rows, None]
        words = [buffer[: len(y)] for buffer in buffers]
        slopes, own = [], []
        for k, c in enumerate(columns):
            _multiply(states[rows, c], weight[:, of_heads[k]].T, words[k])
            log_p, slope = _softmax_(words[k], y, caps[k])
            own.append(log_p)
            slopes.append(slope)
        joint = log_weights[rows] + torch.cat(own, -1)
        log_probs[rows] = joint.logsumexp(-1)
        entropy[rows], is_top1[rows] = _looks(words, log_weights[rows].exp(), y)
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
                _multiply(errors, weight[:, of_heads[k]], of_states[rows, c])
                of_states[rows, c] *= -share
            if needs[2]:
                share = share if counts is None else share * counts[rows, None]
                _add_product(of_head[:, of_heads[k]], errors.T, (share * states[rows, c]).to(dtype), -1)
    return (log_probs, entropy, is_top1), (of_states, of_weights, of_head)


class _GateOfLogits(torch.autograd.Function):
    """log softmax(sum_k x_k W_k^T)[y] for x_k = w_k h_k, as a function of log w_k alone."""

    @staticmethod
    def forward(ctx, log_weights, states, head, targets, widths, cap, chunk):
        new = functools.partial(torch.empty, dtype=_sum_type(states), device=states.device)
        tokens, columns, dtype = len(targets), _columns(widths), _product_type(states, head)
        states, head = states.to(dtype), head.to(dtype)
        log_probs, entropy, is_top1 = new(tokens), new(tokens), new(tokens, dtype=torch.bool)
        ctx.of_weights = new(tokens, len(widths))
        buffer = new(min(chunk, tokens), len(widths), len(head))
        for rows in _slices(tokens, chunk):
            own = buffer[: len(targets[rows])]  # w_k z_k
            for k, c in enumerate(columns):
                _multiply(states[rows, c], head[:, c].T, own[:, k])
            for part in _slices(len(own), _rows_in_cache(own)):
                place, one = slice(rows.start + part.start, rows.start + part.stop), torch.ones_like(own[part, :1, 0])
                y, words = targets[place, None], own[part].sum(1)
                log_p, slope = _softmax_(words, y, cap)
                log_probs[place] = log_p[:, 0]
                entropy[place], is_top1[place] = _looks([words], one, y)
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


# ---- pieces of a chunk


def _softmax_(logits: Tensor, y: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Turns logits into probabilities where they are. Returns log-probabilities of y, and the soft cap's slope."""
    slope, at_y = None, []
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(cap)
    for part in _slices(len(logits), _rows_in_cache(logits)):
        words = logits[part]
        words -= words.amax(-1, keepdim=True)
        chosen = words.gather(-1, y[part])
        total = words.exp_().sum(-1, keepdim=True)
        words /= total
        at_y.append(chosen - total.log())
    return torch.cat(at_y), slope


def _looks(words: Sequence[Tensor], weights: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the mixture of probabilities, and whether no token is more likely than y."""
    entropy, is_top1 = [], []
    for part in _slices(len(y), _rows_in_cache(words[0])):
        p = words[0][part] * weights[part, :1]
        for k in range(1, len(words)):
            p.addcmul_(words[k][part], weights[part, k, None])
        # the library's own argmax and x log x are several times slower
        is_top1.append(p.gather(-1, y[part])[:, 0] >= p.amax(-1))
        entropy.append(-(p * p.clamp(min=torch.finfo(p.dtype).tiny).log_()).sum(-1))
    return torch.cat(entropy), torch.cat(is_top1)


def _columns(widths: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(np.cumsum([0, *widths]).tolist())]


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _rows_in_cache(logits: Tensor) -> int:
    return max(CACHED // logits.shape[-1], 1) if logits.device.type == "cpu" else max(len(logits), 1)


def _sum_type(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _product_type(states: Tensor, head: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes the product in the type of `b`, whatever the type of `out`."""
    with torch.autocast(out.device.type, enabled=False):
        if b.dtype == out.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(a.to(b.dtype) @ b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    with torch.autocast(out.device.type, enabled=False):
        if b.dtype == out.dtype:
            out.addmm_(a, b, alpha=alpha)
        else:
            out.add_(a.to(b.dtype) @ b, alpha=alpha)
