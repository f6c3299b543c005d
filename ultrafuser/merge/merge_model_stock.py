"""Model Stock."""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .merge_base import Merge, weighted_sum


class ModelStockMerge(Merge):
    """Averages the changes, the less of it the less they agree (Jang et al., 2024, https://arxiv.org/abs/2403.19522).

    The average's factor is t = N c / (1 + (N - 1) c), with c the mean cosine between two of the N changes: 1 where all are
    one, 0 where they are orthogonal. Where the mean is negative, t is 0. It has no setting.
    """

    averages = True

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        number = len(changes)
        return self._share(changes, number) * weighted_sum(changes, weights / number)

    def _share(self, changes: list[Tensor], number: int) -> Tensor | float:
        if number == 1:
            return 1.0
        flat = [change.flatten() for change in changes]
        cosine = torch.stack([F.cosine_similarity(a, b, dim=0) for a, b in combinations(flat, 2)]).mean().clamp(min=0)
        return number * cosine / (1 + (number - 1) * cosine)
