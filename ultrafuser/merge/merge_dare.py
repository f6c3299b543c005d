"""DARE."""

from peft.utils.merge_utils import dare_linear
from torch import Tensor

from .merge_base import DENSITY, Merge


class DareMerge(Merge):
    """Drops changes at random and scales up the rest (Yu et al., 2024, https://arxiv.org/abs/2311.03099)."""

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return dare_linear(changes, weights, DENSITY)
