"""The "similarity" reward of Mixture-of-Skills (Wu et al., 2024, https://arxiv.org/abs/2406.08811)."""

import numpy as np
from numpy import ndarray

from .reward_base import Reward


class SimilarityReward(Reward):
    """Similarity of each domain's mean hidden state on the pool to the others', or to the target's alone."""

    def measure(self) -> ndarray:
        return similarity(self.probe.mean_hidden_states(), self.target)


def similarity(z: ndarray, target: int | None = None) -> ndarray:
    """Reward: how much each domain resembles all domains, the mean of its cosines with itself included (Eq. 8).

    Of a fused model these are the specialists' states times their gate weights, so in stage one, where specialists are
    frozen, it moves with the gate alone.

    Args:
        z: Mean hidden state of each domain (Eq. 7). Shape (domains, hidden).
        target: Index of a domain to specialise in (the paper's MoSpec): the cosine to that domain alone, 1 for itself.

    Returns:
        Between -1 and 1. Shape (domains,).
    """
    found = cosines(z, z)
    return found.mean(1) if target is None else found[:, target]


def cosines(a: ndarray, b: ndarray) -> ndarray:
    """Cosine of every row of one with every row of the other. Shape (rows of a, rows of b)."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
