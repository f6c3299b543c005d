"""Shares of training data, searched for among merges: data ablation by merging."""

from collections.abc import Callable

import torch
from torch import Tensor

from .search_map import CANDIDATES, Search, drawn, points_of, quadratic_search


def simplex_search(
    measure: Callable[[list[float]], dict[str, float]],
    specialists: int,
    *,
    points: int | None = None,
    seed: int = 0,
) -> Search:
    """Searches shares p that sum to 1, where base + sum_k p_k (specialist_k - base) stands for a model trained on the mix p.

    With a specialist of each domain, tuned from one base for as long as a model of the mix would be, a merge costs no
    training: averages of models of data parts predict how models of the parts together compare (Na et al., 2024, *Scalable
    Data Ablation Approximations for Language Models through Modular Training and Merging*, arXiv 2410.15661). Measured are
    the specialists alone and merges all over the simplex; a quadratic is fitted as in `map_search`.

    Args:
        measure: From one share per specialist to losses by domain.
        specialists: Number of them.
        points: Points to measure; by default as many as `points_of` says.
        seed: Of the points.
    """
    number = (points_of(specialists) if points is None else points) - specialists
    tried = torch.cat([torch.eye(specialists, dtype=torch.float64), on_simplex(specialists, number, seed)])
    found = quadratic_search(measure, tried, on_simplex(specialists, CANDIDATES, seed + 1))
    found.shares = True
    return found


def on_simplex(specialists: int, number: int, seed: int) -> Tensor:
    """Draws evenly spread shares that sum to 1. Shape (number, specialists)."""
    # exponentials over their sum are uniform on the simplex
    waits = -torch.log1p(-drawn(specialists, number, seed))
    return waits / waits.sum(1, keepdim=True)
