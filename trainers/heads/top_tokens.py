"""A mixture of logits from a few numbers per token: its likeliest tokens, and a polynomial for the sum over the others.

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


TOP = 64
DEGREE = 4  # 15 terms for three specialists, 330 for eight
# stands for log 0, where -inf times a weight of 0 would be no number
NOTHING = -1e4


@lru_cache
def _exponents(specialists: int) -> tuple[Tensor, Tensor]:
    """Exponents and factors of the polynomial's terms. Shapes (terms, specialists) and (terms,)."""
    of = [e for e in product(range(DEGREE + 1), repeat=specialists) if sum(e) == DEGREE]
    factors = [factorial(DEGREE) / prod(map(factorial, e)) for e in of]
    return torch.tensor(of, dtype=torch.float64), torch.tensor(factors, dtype=torch.float64)


def terms(specialists: int) -> int:
    """Counts the polynomial's coefficients per token."""
    return len(_exponents(specialists)[1])


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
