"""Base of all policies: how a learned mix follows its rewards."""

import numpy as np
from numpy import ndarray


class Stateful:
    """Saves arrays as lists, and restores them exactly: JSON keeps every digit of a float64.

    Attributes:
        memory: Names of the arrays.
    """

    memory: tuple[str, ...]

    def state_dict(self) -> dict:
        """Returns what an update reads and writes, as numbers and lists, without the settings."""
        return {name: getattr(self, name).tolist() for name in self.memory}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()` of an object with the same settings."""
        saved = {name: np.asarray(value) for name, value in state.items()}
        here = {name: getattr(self, name) for name in self.memory}
        shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (here, saved)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"A learned mix resumes with the policy, the settings and the domains it was saved with, but "
                f"{type(self).__name__} has {shapes[0]} and the saved state {shapes[1]}. Resume with those, or start "
                f"a new run."
            )
        for name, array in here.items():
            setattr(self, name, saved[name].astype(array.dtype))


class Policy(Stateful):
    """Base of all policies. A policy is one file with one subclass, and one line in `POLICIES`.

    It is constructed with the prior, of shape (domains,), and its settings by keyword, from `mix_policy_settings`.

    Attributes:
        reads_losses: Whether its rewards must be plain losses, neither another measure nor smoothed.
    """

    reads_losses = False

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        """Returns the next mix for new rewards.

        Args:
            rewards: None below 0. Shape (domains,).
            mix: The mix in force; masked domains have 0. Shape (domains,).

        Returns:
            Shares, of shape (domains,).
        """
        raise NotImplementedError


class Smoothing(Stateful):
    """R = beta R' + (1 - beta) R'', with R' the new reward and R'' the last *smoothed* one (Eq. 11).

    Beta multiplies the NEW reward: the paper's 0.9 is light smoothing, which takes away 18% of the variance; 0.1 takes
    away 95%, and 1 switches smoothing off. Where the paper is silent, this is its authors' code: recursive, from 1.
    """

    memory = ("value",)

    def __init__(self, domains: int, beta: float = 0.9):
        if not 0 < beta <= 1:
            raise ValueError(f"beta is the share of the new reward, above 0 and at most 1, but is {beta}.")
        self.beta = beta
        self.value = np.ones(domains)

    def update(self, rewards: ndarray) -> ndarray:
        """Returns the smoothed rewards, which include the new ones. Shape (domains,)."""
        self.value = self.beta * rewards + (1 - self.beta) * self.value
        return self.value


def log_prior(prior: ndarray) -> ndarray:
    """Returns the logarithms of the prior. Shape (domains,)."""
    # masked domains get a finite score, which JSON can hold; `softmax` masks them
    return np.log(np.where(prior > 0, prior, 1))
