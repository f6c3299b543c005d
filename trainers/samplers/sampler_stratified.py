"""The "stratified" sampler: exact shares in every batch."""

import numpy as np

from .sampler_base import DomainSampler


# Fractional part of the golden ratio: its multiples, modulo 1, fill the unit interval more evenly than chance would.
GOLDEN = 0.6180339887498949


class StratifiedSampler(DomainSampler):
    """Each batch holds every domain's exact share, or one of the two whole numbers next to it, evenly over batches.

    Batch b takes its domains at the points (u_b + i) / batch_size of the cumulated mix (systematic sampling), where u_b
    are the multiples of the golden ratio, modulo 1.
    """

    def quotas(self, batch: int) -> np.ndarray:
        mix = self.mix(batch)
        points = ((self.offset + batch * GOLDEN) % 1 + np.arange(self.batch_size)) / self.batch_size
        # rounding may leave the last edge a hair below 1
        chosen = np.minimum(np.searchsorted(np.cumsum(mix), points, side="right"), np.flatnonzero(mix)[-1])
        return np.bincount(chosen, minlength=len(mix))
