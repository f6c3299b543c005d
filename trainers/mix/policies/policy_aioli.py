"""The "aioli" policy: Aioli."""

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .policy_base import Policy, log_prior


class AioliPolicy(Policy):
    """Aioli (Chen et al., 2024, arXiv 2411.05735): p_j = prior_j exp(eta sum_i A_ij), normalised.

    A_ij says how much the loss of domain i falls while domain j is trained. It is measured: the mix leans on each
    domain in turn for one update, and drops of losses = A @ mix is solved for A. Then the resulting mix holds for
    `hold` updates, and the next sweep begins. The rewards must be losses, unsmoothed. Simplified: one sweep per
    estimate, in a fixed order, no moving average, and each new mix starts from the prior.
    """

    reads_losses = True
    memory = ("losses", "mixes", "drops", "gains", "updates")

    def __init__(self, prior: ndarray, *, eta: float = 1.0, lean: float = 0.75, hold: int = 4):
        self.prior, self.eta, self.lean, self.hold = log_prior(prior), eta, lean, hold
        domains = len(prior)
        self.losses, self.gains = np.zeros(domains), np.zeros(domains)
        self.mixes, self.drops = np.zeros((domains, domains)), np.zeros((domains, domains))
        self.updates = np.array(0)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen, domains = mix > 0, len(mix)
        turn = int(self.updates) % (domains + self.hold)
        if 1 <= turn <= domains:  # the mix that has just been in force belongs to a sweep
            self.mixes = np.vstack([self.mixes[1:], mix])
            self.drops = np.vstack([self.drops[1:], np.where(seen, self.losses - rewards, 0)])
        if turn == domains:
            # least squares, because a domain masked in mid-sweep leaves fewer mixes than domains
            graph = np.linalg.lstsq(self.mixes, self.drops, rcond=1e-10)[0].T
            graph = graph - min(graph.min(), 0)
            self.gains = graph.sum(0) / max(graph.sum(), np.finfo(float).tiny)
        self.losses, self.updates = rewards, self.updates + 1
        if turn < domains and seen[turn]:
            others = seen & (np.arange(domains) != turn)
            leaning = np.where(others, (1 - self.lean) / max(others.sum(), 1), 0)
            leaning[turn] = 1 - leaning.sum()
            return leaning
        return softmax(self.prior + self.eta * self.gains, seen)
