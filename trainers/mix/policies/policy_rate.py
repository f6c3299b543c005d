"""The "rate" policy: Mixture-of-Skills without the scorer."""

import numpy as np
from numpy import ndarray

from .policy_base import Policy


class RatePolicy(Policy):
    """Goes a share `rate` of the way to R / sum R at every update: p = (1 - rate) p + rate R / sum R.

    Mixture-of-Skills without the scorer: the same end, and one setting that can be read, since the mix remembers about
    1 / rate updates.
    """

    memory = ("shares",)

    def __init__(self, prior: ndarray, *, rate: float = 0.1):
        self.rate = rate
        # not read from the mix in force: a floor would be added anew at every update
        self.shares = np.asarray(prior, dtype=np.float64)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen = mix > 0
        self.shares = np.where(seen, self.shares, 0) / self.shares[seen].sum()
        total = rewards[seen].sum()
        if total > 0:
            shares = (1 - self.rate) * self.shares + self.rate * np.where(seen, rewards, 0) / total
            # a share of 0 would mask its domain for good
            self.shares = np.where(seen, shares.clip(min=1e-300), 0)
        return self.shares
