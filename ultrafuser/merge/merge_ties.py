"""TIES."""

from peft.utils.merge_utils import ties
from torch import Tensor

from .merge_base import DENSITY, Merge


class TiesMerge(Merge):
    """Keeps the largest changes, elects a sign per number, averages what agrees (Yadav et al., 2023, arXiv 2306.01708)."""

    averages = True

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return ties(changes, weights, DENSITY)
