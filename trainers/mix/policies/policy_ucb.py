"""The "ucb" policy: an upper confidence bound."""

import math

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .policy_base import Policy


class UCBPolicy(Policy):
    """Softmax of reward + sqrt(2 ln(n + 1) / (n_i + 1)): what is rewarding, or seldom drawn (DUMP, arXiv 2504.09710).

    Simplified: n_i is the sum of the domain's shares of the mix, in updates, not a count of examples; the reward is
    the last one, smoothed by the caller, not a mean over a window. The prior is forgotten at the first update.
    """

    memory = ("shares",)

    def __init__(self, prior: ndarray, *, temperature: float = 1.0):
        self.temperature = temperature
        self.shares = np.zeros(len(prior))

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        self.shares = self.shares + mix
        bonus = np.sqrt(2 * math.log(self.shares.sum() + 1) / (self.shares + 1))
        return softmax((rewards + bonus) / self.temperature, mix > 0)
