"""Base of all static mixes: how often each domain is drawn, from the sizes of the domains."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray


class Mix:
    """Base of all static mixes. A mix is one file with one subclass, and one line in `MIXES`.

    A learned mix starts from a static one.

    Args:
        args: The stage's settings, see `MixConfig`. A mix checks those that it reads.
        domains: Names of the domains, in the order of the mix.
    """

    def __init__(self, args, domains: Sequence[str]):
        self.args, self.domains = args, domains

    def shares(self, sizes: Sequence[int]) -> ndarray:
        """Returns the share of each domain, float64 of shape (domains,), which sums to 1.

        Args:
            sizes: Number of examples of each domain. Length: domains.

        Raises:
            ValueError: If a domain has no examples, or the settings do not fit.
        """
        counts = np.asarray(sizes, dtype=np.float64)
        if counts.ndim != 1 or not len(counts) or not (counts >= 1).all():
            raise ValueError(
                f"Every domain needs at least one example, but sizes are {sizes}. Leave out the empty ones."
            )
        return self.of_counts(counts)

    def of_counts(self, counts: ndarray) -> ndarray:
        """Returns the shares for counts that are checked: float64, each at least 1. Shape (domains,)."""
        raise NotImplementedError
