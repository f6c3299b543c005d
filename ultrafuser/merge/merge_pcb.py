"""Parameter competition balancing."""

import torch
from torch import Tensor

from modeling_ultrafuser.sparsifier_base_ultrafuser import number_of

from .merge_base import Merge


EDGE = 1e-4  # share of each change that is cut at either end


class PcbMerge(Merge):
    """Averages changes by how much each number competes, among its own and with the others' (Du et al., 2024, arXiv 2410.02396).

    A number's score is exp(N size^2) tanh(change * sum of changes), the size scaled to 0..1. The largest scores, 10 % or what
    follows the colon, share the parameter; all others get nothing. The authors score a whole model at once, this one
    parameter at a time.
    """

    averages = True

    def __init__(self, setting: str | None = None):
        rule = "PCB gives a share of each change a part, above 0 and up to 1, as in pcb:0.05."
        self.kept = number_of("0.1" if setting is None else setting, float, lambda share: 0 < share <= 1, rule)

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        total = torch.stack(changes).sum(0)
        merged, shares = torch.zeros_like(total), torch.zeros_like(total)
        for change, weight in zip(changes, weights, strict=True):
            size = _bounded(change.abs(), EDGE, EDGE)
            score = (len(changes) * _scaled(size) ** 2).exp() * (change * total).tanh()
            share = _scaled(_bounded(score, 1 - self.kept, 0.0))
            merged += weight * share * change.sign() * size
            shares += share
        return merged / shares.clamp(min=1e-12)

    def __str__(self) -> str:
        return f"keeps {self.kept:g}"


def _bounded(numbers: Tensor, low: float, high: float) -> Tensor:
    """Cuts numbers at those before which, and behind which, these shares lie in ascending order."""
    flat, count = numbers.flatten(), numbers.numel()
    first, last = int(count * low), int(count * (1 - high) - 1)
    return numbers.clamp(*(flat.kthvalue(max(min(place, count - 1), 0) + 1).values for place in (first, last)))


def _scaled(numbers: Tensor) -> Tensor:
    """Scales numbers linearly to 0..1; all to 0 if they are equal."""
    low = numbers.min()
    return (numbers - low) / (numbers.max() - low).clamp(min=torch.finfo(numbers.dtype).tiny)
