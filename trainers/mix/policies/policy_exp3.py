"""The "exp3" policy: Online Data Mixing."""

import math

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .policy_base import Policy


class Exp3Policy(Policy):
    """Online Data Mixing (Albalak et al., 2023, arXiv 2312.02406), with losses as rewards.

    At update t, with K domains, G = G + scale R / p; e_t = min(1/K, sqrt(ln K / (K t)));
    p = (1 - K e_t) softmax(e_{t-1} G) + e_t, which explores less and less. Scale 0.1 is the authors' code.
    Simplified: they reward one drawn domain per step, which is what dividing by p corrects for, and count steps in t.
    Here every domain is rewarded at every update, and t counts updates. The prior is forgotten at the first update.
    """

    memory = ("gains", "updates")

    def __init__(self, prior: ndarray, *, scale: float = 0.1):
        self.scale = scale
        self.gains = np.zeros(len(prior))
        self.updates = np.array(0)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen = mix > 0
        domains = seen.sum()
        self.gains = self.gains + self.scale * np.where(seen, rewards, 0) / np.where(seen, mix, 1)
        before, now = (
            min(1 / domains, math.sqrt(math.log(domains) / (domains * max(t, 1))))
            for t in (self.updates, self.updates + 1)
        )
        self.updates = self.updates + 1
        return (1 - domains * now) * softmax(before * self.gains, seen) + now * seen
