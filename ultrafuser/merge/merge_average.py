"""The plain average of weights."""

from peft.utils.merge_utils import task_arithmetic
from torch import Tensor

from .merge_base import Merge


class AverageMerge(Merge):
    """Averages the weights (model soups; Wortsman et al., 2022, https://arxiv.org/abs/2203.05482)."""

    needs_base = False
    averages = True

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return task_arithmetic(changes, weights / len(changes))
