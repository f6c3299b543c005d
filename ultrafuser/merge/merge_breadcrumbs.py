"""Model Breadcrumbs."""

import torch
from torch import Tensor

from .merge_base import Merge, numbers_of, weighted_sum


class BreadcrumbsMerge(Merge):
    """Adds up the changes without their largest numbers and the many small ones (Davari & Belilovsky, 2023, arXiv 2312.06795).

    In each row of a matrix a share of outliers is dropped; of the rest the largest are kept. "breadcrumbs:0.15,0.006", the
    default, keeps 15 % and drops 0.6 %, as the authors' code does.
    """

    def __init__(self, setting: str | None = None):
        rule = (
            "Breadcrumbs have two shares of each row, what is kept and what is dropped, as in breadcrumbs:0.15,0.006."
        )
        chosen = "0.15,0.006" if setting is None else setting
        self.kept, self.outliers = numbers_of(chosen, 2, float, lambda share: 0 <= share <= 1, rule)

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return weighted_sum([change * self._mask(change) for change in changes], weights)

    def _mask(self, change: Tensor) -> Tensor:
        """Returns 1 where a number is kept. Shape of `change`."""
        if change.ndim == 0:
            return torch.ones_like(change)
        sizes, width = change.abs(), change.shape[-1]
        sizes = sizes.scatter(-1, sizes.topk(int(width * self.outliers), dim=-1).indices, 0.0)
        return torch.zeros_like(change).scatter(-1, sizes.topk(int(width * self.kept), dim=-1).indices, 1.0) * (
            sizes > 0
        )

    def __str__(self) -> str:
        return f"keeps {self.kept:g}, drops {self.outliers:g}"
