"""The "difficulty" reward of Mixture-of-Skills (Wu et al., 2024, https://arxiv.org/abs/2406.08811)."""

import numpy as np
from numpy import ndarray

from .reward_base import Reward


class DifficultyReward(Reward):
    """Perplexity now over perplexity at the start, on the pool."""

    def begin(self) -> None:
        if self.baseline is None:
            self.baseline = self.probe.losses()

    def by_domain(self) -> ndarray:
        pairs = zip(self.probe.by_domain(self.probe.losses()), self.probe.by_domain(self.baseline), strict=True)
        return np.array([difficulty(now, before) for now, before in pairs])


def difficulty(nll: ndarray, nll_start: ndarray) -> float:
    """Reward of one domain: perplexity now over perplexity at the start, averaged over examples (Eq. 9 and 10).

    1 at the start, less as the domain is learnt, more where it is forgotten. What cannot be learnt, such as noise,
    stays at 1 and is therefore drawn more and more: bound it with `guarded`.

    Args:
        nll: Mean negative log-likelihood of each example, nats per trained token. Leave out examples without trained
            tokens. Shape (examples,).
        nll_start: The same examples under the model as it was before training. Shape (examples,).
    """
    change = np.asarray(nll, dtype=np.float64) - np.asarray(nll_start, dtype=np.float64)
    return float(np.exp(change).mean())
