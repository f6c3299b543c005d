"""The "uncertainty" reward: how unsure the model is of each domain."""

import numpy as np
from numpy import ndarray

from .reward_base import Reward


class UncertaintyReward(Reward):
    """Mean entropy on the pool, in one pass.

    MultiUAT (Wu et al., 2021, https://arxiv.org/abs/2109.02284) takes 30 with dropout, which language models mostly lack.
    """

    def by_domain(self) -> ndarray:
        return np.array([entropy.mean() for entropy in self.probe.by_domain(self.probe.losses(entropy=True))])
