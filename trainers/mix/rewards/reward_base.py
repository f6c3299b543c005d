"""Base of all rewards: one number per domain, which a learned mix follows."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from ..probe import Probe


class Reward:
    """Base of all rewards. A reward is one file with one subclass, and one line in `REWARDS`.

    Args:
        args: The stage's settings, see `MixConfig`. A reward checks those that it reads.
        probe: Measures the stage whose mix is learned.

    Raises:
        ValueError: If it cannot be measured in such a stage.

    Attributes:
        reads_pool: Whether it is measured on the pool, by passes of its own, and not from training batches.
        needs_specialists: Whether domains must be named as specialists are.
        watches_specialists: Whether every batch must also score the domain's own specialist.
        is_loss: Whether it is a plain loss, which some policies need.
        baseline: Values of the pool's examples before the first step, which later ones are compared with, or None.
    """

    reads_pool = True
    needs_specialists = False
    watches_specialists = False
    is_loss = False
    baseline: ndarray | None = None

    def __init__(self, args, probe: Probe):
        self.args, self.probe = args, probe
        self.target = None if args.mix_target is None else probe.domains.index(args.mix_target)
        if self.reads_pool and (args.packing or args.padding_free):
            raise ValueError(
                f"mix_reward={args.mix_reward!r} scores examples one by one, but with packing or without padding they "
                f"share rows. Set packing=False and padding_free=False, or learn from 'loss', or from 'regret' in stage "
                f"one."
            )

    def begin(self) -> None:
        """Measures the baseline, before the first step."""

    def measure(self) -> ndarray:
        """Measures the domains, that to specialise in (MoSpec) with twice its reward. Shape (domains,)."""
        rewards = self.by_domain()
        return rewards if self.target is None else rewards * np.where(np.arange(len(rewards)) == self.target, 2, 1)

    def by_domain(self) -> ndarray:
        """Measures the domains, without regard to the target. Shape (domains,)."""
        raise NotImplementedError


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
