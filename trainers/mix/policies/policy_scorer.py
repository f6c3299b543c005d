"""Base of the Mixture-of-Skills policies (Wu et al., 2024, https://arxiv.org/abs/2406.08811): gradient ascent on scores."""

import numpy as np
from numpy import ndarray

from ..shares import softmax
from .policy_base import Policy


class ScorerPolicy(Policy):
    """Scores of the domains, climbing sum_i R_i log p_i with p = softmax(scores) (Eq. 6).

    All domains count alike in that sum, whatever their share, so it is a cross-entropy and has one optimum:
    p = R / sum R. Everything else here sets the speed at which p goes there. Adam never quite rests there: of a
    vanishing gradient it still makes steps of the learning rate.
    """

    memory = ("parameters", "mean", "square", "steps")

    def __init__(self, parameters: ndarray, learning_rate: float, inner_steps: int, optimizer: str):
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"Unknown optimizer {optimizer!r}. Choose 'sgd' or 'adam'.")
        self.parameters, self.learning_rate = parameters, learning_rate
        self.inner_steps, self.optimizer = inner_steps, optimizer
        self.mean, self.square = np.zeros_like(parameters), np.zeros_like(parameters)
        self.steps = np.array(0)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen = mix > 0
        rewards = np.where(seen, rewards, 0)
        for _ in range(self.inner_steps):
            # of -sum_i R_i log p_i, with respect to the scores
            self._descend(self._gradient(softmax(self._scores(), seen) * rewards.sum() - rewards))
        return softmax(self._scores(), seen)

    def _scores(self) -> ndarray:
        raise NotImplementedError

    def _gradient(self, by_scores: ndarray) -> ndarray:
        raise NotImplementedError

    def _descend(self, gradient: ndarray) -> None:
        if self.optimizer == "adam":  # betas and epsilon as in torch.optim.Adam
            self.steps = self.steps + 1
            self.mean = 0.9 * self.mean + 0.1 * gradient
            self.square = 0.999 * self.square + 0.001 * gradient**2
            gradient = self.mean / (1 - 0.9**self.steps)
            gradient = gradient / (np.sqrt(self.square / (1 - 0.999**self.steps)) + 1e-8)
        self.parameters = self.parameters - self.learning_rate * gradient
