"""Task arithmetic."""

from peft.utils.merge_utils import task_arithmetic
from torch import Tensor

from .merge_base import Merge


class TaskArithmeticMerge(Merge):
    """Adds the changes up (Ilharco et al., 2023, https://arxiv.org/abs/2212.04089)."""

    adds = True

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return task_arithmetic(changes, weights)
