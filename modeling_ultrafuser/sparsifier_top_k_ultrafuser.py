"""The "top_k" sparsifier: a number of specialists."""

from torch import Tensor

from .sparsifier_base_ultrafuser import Sparsifier, falling, number_of


class TopKSparsifier(Sparsifier):
    """Keeps the k largest weights, top_k:2, the earlier one of equals; all where there are no more.

    top_k:1 is how Switch transformers route (Fedus et al., 2022, arXiv 2101.03961).
    """

    def __init__(self, setting: str | None = None):
        rule = "top_k keeps a number of specialists, at least 1, as in top_k:2."
        self.number = number_of(setting, int, lambda number: number >= 1, rule)

    def kept(self, weights: Tensor) -> Tensor:
        return falling(weights)[1] < self.number
