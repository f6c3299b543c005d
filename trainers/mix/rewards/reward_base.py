"""What all rewards share: one number per domain, which a learned mix follows."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from ..pool import Pool


class Reward:
    """Base of all rewards. A reward is one file with one subclass, and one line in `REWARDS`.

    Args:
        trainer: The stage whose mix is learned.

    Raises:
        ValueError: If it cannot be measured in such a stage.

    Attributes:
        reads_pool: Whether it is measured on the pool, by passes of its own, and not from training batches.
        needs_specialists: Whether domains must be named as specialists are.
        watches_specialists: Whether every batch must show what the domain's own specialist says.
        reads_cache: Whether what a gate's cache holds is enough to measure it.
        is_loss: Whether it is a loss as it is, which some policies ask for.
        baseline: What the start is compared by, of each of the pool's examples, or None.
    """

    reads_pool = True
    needs_specialists = False
    watches_specialists = False
    reads_cache = False
    is_loss = False
    baseline: ndarray | None = None

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        target = self.args.mix_target
        self.target = None if target is None else trainer.domains.index(target)
        if self.reads_pool:
            if self.args.packing or self.args.padding_free:
                raise ValueError(
                    f"mix_reward={self.args.mix_reward!r} scores examples one by one, but with packing or without padding "
                    f"they share rows. Set packing=False and padding_free=False, or learn from 'loss', or from 'regret' in "
                    f"stage one."
                )
            self.pool = Pool(trainer)

    def begin(self) -> None:
        """Measures, before the first step, what the start is compared by."""

    def measure(self) -> ndarray:
        """Measures the domains. Shape (domains,)."""
        rewards = self.by_domain()
        return rewards if self.target is None else towards_target(rewards, self.target)

    def by_domain(self) -> ndarray:
        """Measures the domains, whichever is the target. Shape (domains,)."""
        raise NotImplementedError

    def batch_losses(self) -> tuple[ndarray, ndarray]:
        """Mean losses of each domain's batches since the last update, and of its own specialist. Shapes (domains,)."""
        found = self.trainer.statistics.since("mix", self.trainer.accelerator)
        # mixed examples, counted last, are of no domain
        nll, own, tokens = (n[: len(self.trainer.domains)] for n in (found.nll, found.own_nll, found.tokens))
        return nll / tokens, own / tokens


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
