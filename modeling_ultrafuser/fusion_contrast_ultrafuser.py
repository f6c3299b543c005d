"""The "contrast" rule: from what the gate's mixture predicts, what an amateur predicts is subtracted."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .fusion_base_ultrafuser import Fusion
from .refusals_ultrafuser import Refusal


class ContrastSettings(NamedTuple):
    """Settings of contrast, in the order in which a configuration gives them.

    Attributes:
        strength: b, at least 0.
        cutoff: a, above 0 and up to 1.
        amateur: Name of a specialist. Default: at each token the one with the least weight.
    """

    strength: float = 0.5
    cutoff: float = 0.1
    amateur: str | None = None


class ContrastFusion(Fusion):
    """Subtracts an amateur's logits from the gate's mixture of logits, among tokens that the mixture holds plausible.

    With z_strong the mixture and z_weak the amateur's logits,

        z = (1 + b) z_strong - b z_weak    where z_strong >= max z_strong + log a, else minus infinity

    Self-contrast (Shi et al., 2024, arXiv 2405.14507) is "contrast": the amateur is the specialist with the least weight at
    this token, and the defaults b = 0.5 and a = 0.1 are its authors'. Contrastive decoding (Li et al., 2022, arXiv
    2210.15097, in this form O'Brien and Lewis, 2023, arXiv 2309.09117) is "contrast:0.5,0.1,NAME": the amateur is one
    specialist, which is then no part of the mixture; the others share out its weight. b = 0 is the plausibility cut alone.

    For decoding: of a text with a token that is cut off the loss is infinite.
    """

    has_loss = False
    needs_all = True
    # as the "logits" rule, whose gates it reads
    scale_for_each = False
    switch_probability = 1e-6
    format_version = 2

    def __init__(self, config):
        super().__init__(config)
        # a model may be loaded with another rule than its configuration was checked with
        self.check(config)

    @classmethod
    def parsed(cls, setting: str | None) -> ContrastSettings:
        strength, cutoff, amateur = [*(setting or "").split(",", 2), "", ""][:3]
        try:
            settings = ContrastSettings(float(strength or 0.5), float(cutoff or 0.1), amateur or None)
        except ValueError:
            settings = None
        if settings is None or not (0 <= settings.strength < math.inf and 0 < settings.cutoff <= 1):
            raise ValueError(
                f"contrast takes its strength, at least 0, its cut-off, above 0 and up to 1, and the amateur's name, as in "
                f"contrast:0.5,0.1 or contrast:0.5,0.1,base. But got {setting!r:.100}."
            )
        return settings

    @classmethod
    def check(cls, config) -> None:
        """Rejects an amateur that is none of the specialists."""
        amateur = cls.parsed(config.fusion.partition(":")[2]).amateur
        if amateur is not None and amateur not in config.specialist_names:
            raise Refusal(
                f"`fusion` is {config.fusion!r}, and there is no specialist {amateur!r}",
                "The amateur of contrast is one of the specialists",
                f"Name one of {config.specialist_names}, or none for the one with the least weight at each token.",
                about="fusion",
            )

    def factors(self, gate_weights: Tensor, logit_scales: Tensor | None) -> Tensor | None:
        return None if logit_scales is None else logit_scales.expand(gate_weights.shape)

    def combined(self, logits: Iterable[Tensor], gate_weights: Tensor) -> Tensor:
        """Returns logits, minus infinity where a token is cut off. Shape (..., vocab)."""
        amateurs, shares = self._roles(gate_weights)
        strong = weak = None
        for k, own in enumerate(logits):
            part = shares[k][..., None] * own
            strong = part if strong is None else strong + part
            weak = own if weak is None else torch.where(amateurs[..., None] == k, own, weak)
        strength, cutoff, _ = self.settings
        implausible = strong < strong.amax(-1, keepdim=True) + math.log(cutoff)
        return ((1 + strength) * strong - strength * weak).masked_fill(implausible, -math.inf)

    def _roles(self, gate_weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns each token's amateur, shape (...,), and each specialist's share in the mixture. Shapes (...,)."""
        weights = list(gate_weights.unbind(-1))
        if self.settings.amateur is None:
            return gate_weights.argmin(-1), weights
        k = self.config.specialist_names.index(self.settings.amateur)
        total = sum(w for i, w in enumerate(weights) if i != k)
        even = torch.full_like(total, 1 / (len(weights) - 1))
        shares = [torch.where(total > 0, w / total, even) for w in weights]
        shares[k] = torch.zeros_like(total)
        return torch.full_like(total, k, dtype=torch.long), shares
