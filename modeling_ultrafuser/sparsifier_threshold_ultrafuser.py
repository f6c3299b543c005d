"""The "threshold" sparsifier: specialists with a least weight."""

from torch import Tensor

from .sparsifier_base_ultrafuser import Sparsifier, number_of


class ThresholdSparsifier(Sparsifier):
    """Keeps weights of at least a number, threshold:0.25, and the largest one in any case."""

    def __init__(self, setting: str | None = None):
        rule = "threshold keeps weights of at least a number from 0 up to below 1, as in threshold:0.25."
        self.least = number_of(setting, float, lambda least: 0 <= least < 1, rule)

    def kept(self, weights: Tensor) -> Tensor:
        return weights >= self.least
