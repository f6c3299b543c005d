"""Pieces of losses in chunks: products, softmax and entropy of a few positions, where their logits are."""

from collections.abc import Sequence

import torch
from torch import Tensor


# positions whose logits are in memory at once: a processor's caches are small, a GPU's launches cost more than memory
CHUNK = {"cpu": 128}
CHUNK_ELSEWHERE = 1024
# logits that stay in a processor's second-level cache while one function after another is taken of them
CACHED = 2**18


def chunk_size(states: Tensor) -> int:
    """Returns how many positions' logits are in memory at once."""
    return CHUNK.get(states.device.type, CHUNK_ELSEWHERE)


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
    chunk, dtype = chunk_size(states), product_type(states, head)
    states, weight = states.to(dtype), head.to(dtype)
    found = states.new_empty(len(targets), dtype=sum_type(states))
    buffer = found.new_empty(min(chunk, len(targets)), len(head))
    for rows in slices(len(targets), chunk):
        words = buffer[: len(targets[rows])]
        multiply(states[rows], weight.T, words)
        found[rows] = softmax_(words, targets[rows, None], cap)[0][:, 0]
    return found


# ---- pieces of a chunk


def softmax_(logits: Tensor, y: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Turns logits into probabilities where they are. Returns log-probabilities of y, and the soft cap's slope."""
    slope, at_y = None, []
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(cap)
    for part in slices(len(logits), rows_in_cache(logits)):
        words = logits[part]
        words -= words.amax(-1, keepdim=True)
        chosen = words.gather(-1, y[part])
        total = words.exp_().sum(-1, keepdim=True)
        words /= total
        at_y.append(chosen - total.log())
    return torch.cat(at_y), slope


def entropy_and_top1(words: Sequence[Tensor], weights: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the mixture of probabilities, and whether no token is more likely than y."""
    entropy, is_top1 = [], []
    for part in slices(len(y), rows_in_cache(words[0])):
        p = words[0][part] * weights[part, :1]
        for k in range(1, len(words)):
            p.addcmul_(words[k][part], weights[part, k, None])
        # the library's own argmax and x log x are several times slower
        is_top1.append(p.gather(-1, y[part])[:, 0] >= p.amax(-1))
        entropy.append(-(p * p.clamp(min=torch.finfo(p.dtype).tiny).log_()).sum(-1))
    return torch.cat(entropy), torch.cat(is_top1)


def slices(length: int, size: int) -> list[slice]:
    """Cuts a length into slices of a size; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def rows_in_cache(logits: Tensor) -> int:
    """Counts the rows of logits that stay in a processor's cache."""
    return max(CACHED // logits.shape[-1], 1) if logits.device.type == "cpu" else max(len(logits), 1)


def sum_type(states: Tensor) -> torch.dtype:
    """Returns the type that sums are kept in."""
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def product_type(states: Tensor, head: Tensor) -> torch.dtype:
    """Returns the type of products with the head: autocast's, or the head's."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes the product in the type of `b`, whatever the type of `out`."""
    with torch.autocast(out.device.type, enabled=False):
        if b.dtype == out.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(a.to(b.dtype) @ b)


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Adds `alpha` times the product, computed in the type of `b`."""
    with torch.autocast(out.device.type, enabled=False):
        if b.dtype == out.dtype:
            out.addmm_(a, b, alpha=alpha)
        else:
            out.add_(a.to(b.dtype) @ b, alpha=alpha)
