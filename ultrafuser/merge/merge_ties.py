"""TIES."""

from peft.utils.merge_utils import ties
from torch import Tensor

from .merge_density import DensityMerge


class TiesMerge(DensityMerge):
    """Keeps the largest changes, elects a sign per number, averages what agrees (Yadav et al., 2023, arXiv 2306.01708).

    "ties:0.2" keeps the 20 % of the paper.
    """

    averages = True

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return ties(changes, weights, self.density)
