"""Rewards that a learned mix follows, as arithmetic on what was measured: one number per domain.

"The paper" is Mixture-of-Skills (Wu et al., 2024, https://arxiv.org/abs/2406.08811).
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy import ndarray


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
    cosines = _cosines(z, z)
    return cosines.mean(1) if target is None else cosines[:, target]


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


def regret(nll_fused: ndarray, nll_own: ndarray) -> float:
    """Reward of one domain: perplexity of the fused model over that of the domain's own specialist, averaged.

    `difficulty` (Eq. 10) with the specialist in place of the start: 1 where fusing costs the domain nothing.

    Args:
        nll_fused: Mean negative log-likelihood of each example, nats per trained token. Shape (examples,).
        nll_own: The same examples under the specialist. Shape (examples,).
    """
    return difficulty(nll_fused, nll_own)


def gradient_cosine(dev: ndarray, train: ndarray) -> ndarray:
    """Reward: how well a step on each domain serves all domains (MultiDDS-S; Wang et al., 2020, arXiv 2004.06748).

    Args:
        dev: Gradient on held-out examples of each domain. Shape (domains, parameters).
        train: Gradient on training examples of each domain. Shape (domains, parameters).

    Returns:
        Mean cosine of a domain's training gradient to every held-out gradient, from -1 to 1. Shape (domains,).
    """
    return _cosines(train, dev).mean(1)


def towards_target(rewards: ndarray, target: int) -> ndarray:
    """Doubles the reward of the domain to specialise in (MoSpec for `difficulty` and `regret`). Shape (domains,)."""
    return np.where(np.arange(len(rewards)) == target, 2 * rewards, rewards)


def usable_rewards(rewards: ndarray, mix: ndarray, domains: Sequence[str]) -> ndarray | None:
    """Rewards that a policy can take: none below 0 and, for masked domains, which nobody measures, 0.

    A negative reward has no fixed point: it would push the domain's share towards 0 without end.

    Args:
        rewards: As measured. Shape (domains,).
        mix: The mix in force. Shape (domains,).
        domains: Names of the domains, for the warning.

    Returns:
        Rewards, shape (domains,), or None if one is NaN or infinite: keep the mix and do not update anything.
    """
    rewards = np.where(mix > 0, np.asarray(rewards, dtype=np.float64), 0)
    broken = {domains[i]: float(rewards[i]) for i in np.flatnonzero(~np.isfinite(rewards))}
    if broken:
        warnings.warn(f"The mix stays as it is, because a reward is not finite: {broken}.", stacklevel=2)
        return None
    return rewards.clip(min=0)


def _cosines(a: ndarray, b: ndarray) -> ndarray:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
