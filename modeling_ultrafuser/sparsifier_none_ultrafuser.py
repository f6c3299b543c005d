"""The "none" sparsifier: every specialist keeps its weight."""

import torch
from torch import Tensor

from .sparsifier_base_ultrafuser import Sparsifier


class NoSparsifier(Sparsifier):
    """Keeps every specialist."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores

    def kept(self, weights: Tensor) -> Tensor:
        return torch.ones_like(weights, dtype=torch.bool)
