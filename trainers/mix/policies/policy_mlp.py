"""The "mlp" policy: Mixture-of-Skills as the paper has it."""

import math

import numpy as np
from numpy import ndarray

from .policy_base import log_prior
from .policy_scorer import ScorerPolicy


class MLPPolicy(ScorerPolicy):
    """Mixture-of-Skills as the paper has it: a two-layer perceptron and one plain step at every update (Algorithm 1).

    Its input says which domains the prior admits, and never changes. The paper gives the rate, but no width,
    activation or optimizer, although these decide between a mix that hardly moves and one that jumps to R / sum R: at
    the defaults it hardly moves. Width 128, ReLU and no biases are choices made here. Weights are drawn from
    N(0, 1 / inputs), and the last layer is then changed as little as makes the mix start at the prior.
    """

    def __init__(
        self,
        prior: ndarray,
        *,
        learning_rate: float = 1e-4,
        inner_steps: int = 1,
        optimizer: str = "sgd",
        width: int = 128,
        seed: int = 0,
    ):
        target = log_prior(prior)
        self.accessible = (prior > 0).astype(np.float64)
        random = np.random.default_rng(seed)
        first = random.normal(size=(width, len(prior))) / math.sqrt(len(prior))
        last = random.normal(size=(len(prior), width)) / math.sqrt(width)
        hidden = (first @ self.accessible).clip(min=0)
        last += np.outer(target - last @ hidden, hidden / (hidden @ hidden))
        self.width = width
        super().__init__(np.concatenate([first.ravel(), last.ravel()]), learning_rate, inner_steps, optimizer)

    def _layers(self) -> tuple[ndarray, ndarray]:
        first, last = np.split(self.parameters, 2)
        return first.reshape(self.width, -1), last.reshape(-1, self.width)

    def _scores(self) -> ndarray:
        first, last = self._layers()
        return last @ (first @ self.accessible).clip(min=0)

    def _gradient(self, by_scores: ndarray) -> ndarray:
        first, last = self._layers()
        hidden = (first @ self.accessible).clip(min=0)
        by_first = np.outer((by_scores @ last) * (hidden > 0), self.accessible)
        return np.concatenate([by_first.ravel(), np.outer(by_scores, hidden).ravel()])
