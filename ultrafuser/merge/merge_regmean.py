"""RegMean."""

import torch
from torch import Tensor

from modeling_ultrafuser.sparsifier_base_ultrafuser import number_of

from .merge_base import Merge, weighted_sum


class RegMeanMerge(Merge):
    """Fits each linear layer to the outputs of all specialists' layers, in closed form (Jin et al., 2023, arXiv 2212.09849).

    W = (sum_k G_k)^-1 sum_k G_k W_k, where G_k are the mean inner products of the inputs of specialist k's layer on rows of
    its own domain. Their off-diagonals are multiplied by 0.9, or by what follows the colon. All else is averaged.
    """

    needs_base = False
    averages = True
    scales = False
    reads_inputs = True

    def __init__(self, setting: str | None = None):
        rule = "RegMean multiplies inner products of different inputs by a number from 0 to 1, as in regmean:0.9."
        self.kept = number_of("0.9" if setting is None else setting, float, lambda share: 0 <= share <= 1, rule)

    def combined(self, changes: list[Tensor], weights: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
        if inputs is None:
            return weighted_sum(changes, weights / weights.sum())
        products = [w * self._reduced(g.to(w)) for g, w in zip(inputs, weights, strict=True)]
        left = torch.stack(products).sum(0)
        right = torch.stack([g @ change.T for g, change in zip(products, changes, strict=True)]).sum(0)
        # an input that is always 0 leaves a row of zeros, for which any weight does
        ridge = torch.finfo(left.dtype).eps * left.diagonal().max().clamp(min=1e-12)
        return torch.linalg.solve(left + ridge * torch.eye(len(left), device=left.device), right).T

    def _reduced(self, products: Tensor) -> Tensor:
        return self.kept * products + (1 - self.kept) * products.diagonal().diag()

    def __str__(self) -> str:
        return f"off-diagonals {self.kept:g}"
