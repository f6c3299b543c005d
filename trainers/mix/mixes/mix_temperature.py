"""The "temperature" mix: between balanced and proportional."""

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .mix_base import Mix


class TemperatureMix(Mix):
    """In proportion to n_i^(1 / `mix_temperature`) (Wu et al., 2024, arXiv 2406.08811, Eq. 3).

    A temperature of 1 is proportional, infinity balanced. The paper takes 10.
    """

    def of_counts(self, counts: ndarray) -> ndarray:
        temperature = self.args.mix_temperature
        if not temperature > 0:
            raise ValueError(f"The temperature of a mix must be above 0, but is {temperature}. 1 is proportional.")
        return softmax(np.log(counts) / temperature, counts > 0)
