"""The "ratio" sparsifier: specialists whose weight is not far below the largest."""

from torch import Tensor

from .sparsifier_base_ultrafuser import Sparsifier, number_of


class RatioSparsifier(Sparsifier):
    """Keeps weights of at least a part of the largest one: half of it with ratio:0.5.

    Expert skipping (Lu et al., 2024, arXiv 2402.14800), whose authors take the median of second to first weights.
    """

    def __init__(self, setting: str | None = None):
        rule = "ratio keeps weights of at least a part of the largest, above 0 and up to 1, as in ratio:0.5."
        self.part = number_of(setting, float, lambda part: 0 < part <= 1, rule)

    def kept(self, weights: Tensor) -> Tensor:
        return weights >= self.part * weights.amax(-1, keepdim=True)
