"""The "proportional" mix."""

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .mix_base import Mix


class ProportionalMix(Mix):
    """As large a share as the domain has of all examples, n_i / sum n."""

    def of_counts(self, counts: ndarray) -> ndarray:
        return softmax(np.log(counts), counts > 0)
