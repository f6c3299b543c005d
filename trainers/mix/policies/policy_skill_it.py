"""The "skill_it" policy: Skill-It."""

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .policy_base import Policy, log_prior


class SkillItPolicy(Policy):
    """Skill-It (Chen et al., 2023, arXiv 2307.14430): p_i = prior_i exp(eta sum_j A_ij L_j), normalised.

    L is the sum of the last `window` losses, so the rewards must be losses, unsmoothed. A_ij says how much training on
    domain i helps domain j. Simplified: the paper measures A beforehand with runs of its own; here it is given, and
    otherwise the identity, which leaves every domain to its own loss.
    """

    reads_losses = True
    memory = ("losses",)

    def __init__(self, prior: ndarray, *, eta: float = 0.2, window: int = 3, graph: ndarray | None = None):
        self.prior, self.eta = log_prior(prior), eta
        self.graph = np.eye(len(prior)) if graph is None else np.asarray(graph, dtype=np.float64)
        self.losses = np.zeros((window, len(prior)))

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        self.losses = np.vstack([self.losses[1:], rewards])
        return softmax(self.prior + self.eta * self.graph @ self.losses.sum(0), mix > 0)
