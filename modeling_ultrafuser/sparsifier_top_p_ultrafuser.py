"""The "top_p" sparsifier: as many specialists as hold a share of the weight."""

import torch
from torch import Tensor

from .sparsifier_base_ultrafuser import Sparsifier, falling, number_of


class TopPSparsifier(Sparsifier):
    """Keeps the largest weights until they sum to p, top_p:0.8, the one that crosses it included; top_p:1.0 keeps all.

    Dynamic routing (Huang et al., 2024, arXiv 2403.07652), whose authors do not normalise what is left.
    """

    def __init__(self, setting: str | None = None):
        rule = "top_p keeps specialists until their weights sum to a share above 0 and up to 1, as in top_p:0.8."
        self.share = number_of(setting, float, lambda share: 0 < share <= 1, rule)

    def kept(self, weights: Tensor) -> Tensor:
        if self.share == 1:
            return torch.ones_like(weights, dtype=torch.bool)
        ordered, ranks = falling(weights)
        before = ordered.cumsum(-1) - ordered
        return (before < self.share).gather(-1, ranks)
