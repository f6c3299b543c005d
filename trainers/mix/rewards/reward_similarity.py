"""The "similarity" reward of Mixture-of-Skills (Wu et al., 2024, https://arxiv.org/abs/2406.08811)."""

import numpy as np
from numpy import ndarray

from .reward_base import Reward


class SimilarityReward(Reward):
    """Similarity of each domain's mean hidden state on the pool (Eq. 7) to all domains', or to the target's alone.

    The mean of its cosines, with itself included (Eq. 8), or the cosine to the domain to specialise in (MoSpec), 1 for
    itself. Of a fused model these are the specialists' states times their gate weights, so in stage one, where
    specialists are frozen, it moves with the gate alone.
    """

    def measure(self) -> ndarray:
        states = self.probe.mean_hidden_states()
        found = cosines(states, states)
        return found.mean(1) if self.target is None else found[:, self.target]


def cosines(a: ndarray, b: ndarray) -> ndarray:
    """Cosine of every row of one with every row of the other. Shape (rows of a, rows of b)."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
