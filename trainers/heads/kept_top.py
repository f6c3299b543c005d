"""Keeps the likeliest tokens and a polynomial for the others: a mixture of logits at little more than the gate's cost.

With gate weights w that sum to 1 and log-probabilities l_k of each specialist, the fused log-probability of y is

    sum_k w_k l_k(y) - log sum_v exp(sum_k w_k l_k(v))

The sum over v is taken word by word over the `TOP` likeliest of each specialist. What the others add, T(w), changes
slowly with w: log T is a polynomial in Bernstein's form, through its values at a lattice on the simplex.
"""

from functools import lru_cache
from itertools import product
from math import factorial, prod

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser.families_ultrafuser import soft_cap

from .chunks import chunk_size
from .kept_base import Kept
from .kept_log_probs import blind


TOP = 64
DEGREE = 4  # 15 terms for three specialists, 330 for eight
# stands for log 0, where -inf times a weight of 0 would be no number
NOTHING = -1e4


class TopKept(Kept):
    """Keeps the likeliest tokens of each specialist, and a polynomial for the others."""

    sees_vocabulary = False

    def check(self) -> None:
        if soft_cap(self.config) is not None:
            raise ValueError("keep='top' sums logits that are not bounded once mixed. Use keep='hidden'.")

    def fields(self) -> dict[str, tuple]:
        number = len(self.config.specialists)
        return {
            "log_probs": ((number,), torch.float32),
            "top": ((number * min(TOP, self.config.vocab_size), number), torch.float32),
            "tail": (_exponents(number)[1].shape, torch.float32),
        }

    def made(self, states: list[Tensor], heads: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        rows = torch.arange(len(targets), device=targets.device).split(chunk_size(targets))
        parts = [_summary([h[r] for h in states], heads, targets[r]) for r in rows]
        return dict(zip(self.fields(), map(torch.cat, zip(*parts, strict=True)), strict=True))

    def score(self, head, weight, kept, states, weights, scales, targets):
        return blind(mixed_log_probs(weights, *(kept[name] for name in self.fields())))


def _summary(states: list[Tensor], heads: list[Tensor], targets: Tensor) -> tuple[Tensor, ...]:
    """Labels' log-probabilities, likeliest tokens, and the polynomial."""
    words = [F.linear(h, w.to(h.dtype)).float().log_softmax(-1) for h, w in zip(states, heads, strict=True)]
    words = torch.stack(words, 1)
    own = words.gather(-1, targets[:, None, None].expand(-1, len(heads), 1))[..., 0]
    return own, *summarised(words)


@lru_cache
def _exponents(specialists: int) -> tuple[Tensor, Tensor]:
    """Exponents and factors of the polynomial's terms. Shapes (terms, specialists) and (terms,)."""
    of = [e for e in product(range(DEGREE + 1), repeat=specialists) if sum(e) == DEGREE]
    factors = [factorial(DEGREE) / prod(map(factorial, e)) for e in of]
    return torch.tensor(of, dtype=torch.float64), torch.tensor(factors, dtype=torch.float64)


def _basis(weights: Tensor) -> Tensor:
    exponents, factors = (t.to(weights) for t in _exponents(weights.shape[-1]))
    return factors * (weights[:, None] ** exponents).prod(-1)


@torch.no_grad()
def summarised(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Names the arrays that are kept of each token.

    Args:
        log_probs: Of all words under each specialist. Shape (tokens, specialists, vocab).

    Returns:
        Log-probabilities of the likeliest words of each specialist under every specialist, each word once, shape (tokens,
        words, specialists); and the polynomial's coefficients, shape (tokens, terms).
    """
    tokens, specialists, vocab = log_probs.shape
    words = log_probs.topk(min(TOP, vocab), -1).indices.flatten(1).sort(-1).values
    again = F.pad(words[:, 1:] == words[:, :-1], (1, 0))
    top = log_probs.gather(-1, words[:, None].expand(-1, specialists, -1)).mT.masked_fill(again[..., None], NOTHING)
    rest = log_probs.scatter(-1, words[:, None].expand(-1, specialists, -1), NOTHING)
    exponents = _exponents(specialists)[0].to(log_probs.device)
    lattice = exponents / exponents.sum(-1, keepdim=True)
    values = [torch.einsum("k,tkv->tv", point.to(rest), rest).logsumexp(-1) for point in lattice]
    values = torch.stack(values, -1).double().clamp(min=NOTHING)
    return top, torch.linalg.solve(_basis(lattice), values.T).T.to(log_probs.dtype)


def mixed_log_probs(weights: Tensor, own: Tensor, top: Tensor, tail: Tensor) -> Tensor:
    """Fused log-probabilities of labels.

    Args:
        weights: Gate weights, which sum to 1. Shape (tokens, specialists).
        own: The labels' log-probabilities under each specialist. Shape (tokens, specialists).
        top: As `summarised` returns it. Shape (tokens, words, specialists).
        tail: As `summarised` returns it. Shape (tokens, terms).

    Returns:
        Shape (tokens,).
    """
    likeliest = (top @ weights[..., None])[..., 0].logsumexp(-1)
    others = (_basis(weights) * tail).sum(-1)
    return (weights * own).sum(-1) - torch.logaddexp(likeliest, others)
