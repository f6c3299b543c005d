"""The "dynamic" rule: as much of what tuning changed in a small model as moves a large one alike."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .fusion_base_ultrafuser import Fusion
from .refusals_ultrafuser import Refusal
from .sparsifiers_ultrafuser import NONE


# factors of the shift that are tried: 0, 0.1, ..., 2
STEPS, STEP = 20, 0.1


class DynamicSettings(NamedTuple):
    """Roles of dynamic; the third specialist is the tuned one.

    Attributes:
        large: Name of the large model.
        base: Name of the small one that was tuned.
    """

    large: str
    base: str


class DynamicFusion(Fusion):
    """Adds to a large model what tuning changed in a small one, at each token the amount that moves both equally far.

    Dynamic logit fusion (Fan et al., 2024, arXiv 2406.15480) of one tuned model. With P = softmax(z_large), Q =
    softmax(z_base), Q_t = softmax(z_tuned), D = z_tuned - z_base and P_x = softmax(z_large + x D) it predicts by P_x, where

        x = argmin over 0, 0.1, ..., 2 of (KL(P_x|P) - KL(Q_t|Q))^2 + (KL(P|P_x) - KL(Q|Q_t))^2

    Both divergences follow from psi(x) = log E_P exp(x D), whose slope is the mean of D under P_x:

        KL(P_x|P) = x psi'(x) - psi(x),    KL(P|P_x) = psi(x) - x E_P D

    A configuration says which is which: "dynamic:LARGE,BASE". The gate plays no part. For decoding: what is the best x is no
    function with a gradient.
    """

    has_loss = False
    needs_all = True
    reads_gate = False
    format_version = 2

    def __init__(self, config):
        super().__init__(config)
        self.check(config)

    @classmethod
    def parsed(cls, setting: str | None) -> DynamicSettings:
        names = (setting or "").split(",")
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            raise ValueError(
                f"dynamic takes the name of the large model and that of the small one that was tuned, as in "
                f"dynamic:large,base. But got {setting!r:.100}."
            )
        return DynamicSettings(*names)

    @classmethod
    def check(cls, config) -> None:
        """Rejects specialists that are not the large model, the tuned one and its base, and a gate that would do nothing."""
        names, roles = config.specialist_names, cls.parsed(config.fusion.partition(":")[2])
        if len(names) != 3 or not set(roles) <= set(names):
            raise Refusal(
                f"`fusion` is {config.fusion!r} and the specialists are {names}",
                "Dynamic fusion is of a large model, a small one that was tuned, and the small one before",
                "Fuse these three, and name the large model and the base: dynamic:large,base.",
                about="fusion",
            )
        if (config.gate, config.gate_sparsifier) != ("uniform", NONE):
            raise Refusal(
                f"`fusion` is {config.fusion!r}, `gate` is {config.gate!r} and `gate_sparsifier` is {config.gate_sparsifier!r}",
                "Dynamic fusion finds its own weights, so that the gate's would have no effect",
                "Choose gate='uniform' without a sparsifier.",
                about="gate",
            )

    def combined(self, logits: Iterable[Tensor], gate_weights: Tensor) -> Tensor:
        """Returns log-probabilities. Shape (..., vocab)."""
        by_name = dict(zip(self.config.specialist_names, (own.log_softmax(-1) for own in logits), strict=True))
        large, base = by_name.pop(self.settings.large), by_name.pop(self.settings.base)
        (tuned,) = by_name.values()
        shift = tuned - base
        targets = _divergence(tuned, base), _divergence(base, tuned)
        return (large + closest(large, shift, *targets)[..., None] * shift).log_softmax(-1)


def closest(large: Tensor, shift: Tensor, away: Tensor, back: Tensor) -> Tensor:
    """Finds how much of a shift moves a distribution as far as another one was moved.

    Args:
        large: Log-probabilities of P. Shape (..., vocab).
        shift: D. Shape (..., vocab).
        away: KL of the other distribution, moved, from where it was. Shape (...,).
        back: KL of the other distribution from where it was moved. Shape (...,).

    Returns:
        x, the smallest of those equally good. Shape (...,).
    """
    mean = (large.exp() * shift).sum(-1)
    least, found = torch.full_like(mean, torch.inf), torch.zeros_like(mean)
    for i in range(STEPS + 1):
        x = i * STEP
        moved = large + x * shift
        psi = moved.logsumexp(-1)
        slope = ((moved - psi[..., None]).exp() * shift).sum(-1)
        distance = (x * slope - psi - away) ** 2 + (psi - x * mean - back) ** 2
        found = found.masked_fill(distance < least, x)
        least = torch.minimum(least, distance)
    return found


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)
