"""The "temperature" mix: between balanced and proportional."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .mix_base import Mix


class TemperatureMix(Mix):
    """In proportion to n_i^(1 / `mix_temperature`) (Wu et al., 2024, arXiv 2406.08811, Eq. 3).

    Args:
        temperature: 1 is proportional, infinity balanced. The paper takes 10.

    Raises:
        ValueError: If the temperature is not above 0.
    """

    def __init__(self, temperature: float = 10.0):
        if not temperature > 0:
            raise ValueError(f"The temperature of a mix must be above 0, but is {temperature}. 1 is proportional.")
        self.temperature = temperature

    @classmethod
    def from_settings(cls, args, domains: Sequence[str]) -> Mix:
        return cls(args.mix_temperature)

    def of_counts(self, counts: ndarray) -> ndarray:
        return softmax(np.log(counts) / self.temperature, counts > 0)
