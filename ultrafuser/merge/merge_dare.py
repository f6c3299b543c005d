"""DARE."""

from peft.utils.merge_utils import dare_linear
from torch import Tensor

from .merge_density import DensityMerge


class DareMerge(DensityMerge):
    """Drops changes at random and scales up the rest (Yu et al., 2024, https://arxiv.org/abs/2311.03099).

    "dare:0.2" drops 80 %, as MergeBench does (He et al., 2025, https://arxiv.org/abs/2505.10833).
    """

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return dare_linear(changes, weights, self.density)
