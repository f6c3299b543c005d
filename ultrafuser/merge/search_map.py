"""Amortised Pareto fronts by a quadratic fit (MAP)."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine


POINTS = 24  # to measure; never fewer than one and a half times the numbers that are fitted
CANDIDATES = 4096  # at which the fit is looked up
SHOWN = 8  # of the front


@dataclass
class Point:
    """Coefficients, and losses by domain.

    Attributes:
        factors: One per specialist.
        losses: Nats per token by domain.
        measured: False if the losses are those of the fit.
    """

    factors: list[float]
    losses: dict[str, float]
    measured: bool = True

    @property
    def mean(self) -> float:
        """Mean over domains."""
        return mean(self.losses.values())


@dataclass
class Search:
    """Result of a search.

    Attributes:
        best: The point that is taken, measured.
        front: Points between which no loss falls without another's rising, by the fit, from the first domain's best on.
        error: Root mean square of what the fit misses at measured points, in nats.
        shares: Whether factors are shares that sum to 1.
    """

    best: Point
    front: list[Point]
    error: float
    shares: bool = False


def map_search(
    measure: Callable[[list[float]], dict[str, float]],
    specialists: int,
    *,
    points: int | None = None,
    most: float = 1.0,
    seed: int = 0,
) -> Search:
    """Measures some coefficients, fits a quadratic to each domain's loss, and reads the trade-off off it.

    As in Li et al., 2024, https://arxiv.org/abs/2406.07529, with points of a Sobol sequence, and its candidates in place of
    an evolutionary search. No gradients: each point costs a merge and a pass over the rows. Taken is the candidate of the
    least mean loss by the fit, or the best measured point if that is better once it is measured, too.

    Args:
        measure: From one factor per specialist to losses by domain.
        specialists: Number of them.
        points: Points to measure; by default as many as `points_of` says.
        most: Largest factor; the least is 0.
        seed: Of the points.
    """
    number = points_of(specialists) if points is None else points
    return quadratic_search(
        measure, most * drawn(specialists, number, seed), most * drawn(specialists, CANDIDATES, seed + 1)
    )


def quadratic_search(measure: Callable[[list[float]], dict[str, float]], tried: Tensor, places: Tensor) -> Search:
    """Fits a quadratic to losses at some factors, and looks it up at others.

    Args:
        measure: From one factor per specialist to losses by domain.
        tried: Factors to measure. Shape (points, specialists).
        places: Where the fit is looked up. Shape (candidates, specialists).
    """
    measured = [Point(factors, measure(factors)) for factors in tried.tolist()]
    domains = list(measured[0].losses)
    known = torch.tensor([[p.losses[d] for d in domains] for p in measured], dtype=torch.float64)
    coefficients = fit(tried, known)
    error = (terms(tried) @ coefficients - known).square().mean().sqrt().item()
    predicted = terms(places) @ coefficients
    front = [
        Point(places[k].tolist(), dict(zip(domains, predicted[k].tolist(), strict=True)), measured=False)
        for k in _spread(predicted)
    ]
    least = places[predicted.mean(1).argmin()].tolist()
    best = min([*measured, Point(least, measure(least))], key=lambda p: p.mean)
    return Search(best, front, error)


def drawn(specialists: int, number: int, seed: int) -> Tensor:
    """Draws points of a Sobol sequence. Shape (number, specialists)."""
    return SobolEngine(specialists, scramble=True, seed=seed).draw(number, dtype=torch.float64)


def points_of(specialists: int) -> int:
    """Returns how many points are measured before the fit."""
    return max(POINTS, (specialists + 1) * (specialists + 2) * 3 // 4)


def terms(factors: Tensor) -> Tensor:
    """Returns squares, products, the factors themselves and 1. Shape (points, (N + 1) (N + 2) / 2)."""
    rows, columns = torch.triu_indices(factors.shape[1], factors.shape[1])
    return torch.cat([factors[:, rows] * factors[:, columns], factors, torch.ones_like(factors[:, :1])], dim=1)


def fit(factors: Tensor, losses: Tensor) -> Tensor:
    """Fits a quadratic to each column of losses, the smallest of equally good ones. Shape (terms, domains)."""
    # on a simplex terms depend on each other: what is zero but for rounding must count as zero on every processor
    return torch.linalg.lstsq(terms(factors), losses, rcond=1e-10, driver="gelsd").solution


def pareto(losses: Tensor) -> Tensor:
    """Marks rows that no other row beats in one column and equals or beats in all. Shape (points,)."""
    no_worse = (losses[:, None] <= losses[None]).all(-1)
    better = (losses[:, None] < losses[None]).any(-1)
    return ~(no_worse & better).any(0)


def _spread(losses: Tensor) -> list[int]:
    """Picks points of the front that are evenly spread over the first domain's loss."""
    front = pareto(losses).nonzero().flatten()
    front = front[losses[front, 0].argsort()]
    places = torch.linspace(0, len(front) - 1, min(SHOWN, len(front))).round().long()
    return front[places].tolist()
