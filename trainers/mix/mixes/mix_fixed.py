"""The "fixed" mix: shares that the user gives."""

import numpy as np
from numpy import ndarray

from .mix_base import Mix


class FixedMix(Mix):
    """The shares of `mix_weights`, on any scale; a domain without a weight, or with 0, is left out."""

    def of_counts(self, counts: ndarray) -> ndarray:
        weights = [(self.args.mix_weights or {}).get(domain, 0.0) for domain in self.domains]
        shares = np.asarray(weights, dtype=np.float64)
        if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
            raise ValueError(
                f"A fixed mix needs one finite weight per domain, none negative and not all 0, but weights are "
                f"{weights} for {len(counts)} domains. Give weights such as {[1.0] * len(counts)}."
            )
        return shares / shares.sum()
