"""The "logits" policy: Mixture-of-Skills as its authors' code has it."""

from numpy import ndarray

from .policy_base import log_prior
from .policy_scorer import ScorerPolicy


class LogitsPolicy(ScorerPolicy):
    """Mixture-of-Skills as its authors' code has it: one number per domain, 200 steps of Adam at every update.

    No score moves by much more than 200 * 1e-4 = 0.02 per update.
    """

    def __init__(
        self, prior: ndarray, *, learning_rate: float = 1e-4, inner_steps: int = 200, optimizer: str = "adam"
    ):
        super().__init__(log_prior(prior), learning_rate, inner_steps, optimizer)

    def _scores(self) -> ndarray:
        return self.parameters

    def _gradient(self, by_scores: ndarray) -> ndarray:
        return by_scores
