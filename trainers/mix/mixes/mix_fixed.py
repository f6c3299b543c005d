"""The "fixed" mix: shares that the user gives."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from .mix_base import Mix


class FixedMix(Mix):
    """The shares of `mix_weights`.

    Args:
        weights: Shares on any scale; 0 leaves a domain out. Length: domains.
    """

    def __init__(self, weights: Sequence[float] | None):
        self.weights = weights

    @classmethod
    def from_settings(cls, args, domains: Sequence[str]) -> Mix:
        weights = args.mix_weights or {}
        return cls([weights.get(domain, 0.0) for domain in domains])

    def of_counts(self, counts: ndarray) -> ndarray:
        shares = np.asarray([] if self.weights is None else self.weights, dtype=np.float64)
        if shares.shape != counts.shape or not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
            raise ValueError(
                f"A fixed mix needs one finite weight per domain, none negative and not all 0, but weights are "
                f"{self.weights} for {len(counts)} domains. Give weights such as {[1.0] * len(counts)}."
            )
        return shares / shares.sum()
