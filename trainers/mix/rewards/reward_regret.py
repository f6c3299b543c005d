"""The "regret" reward: what fusing costs each domain, against its own specialist."""

import numpy as np
from numpy import ndarray

from ..probe import Probe
from .reward_difficulty import DifficultyReward


class RegretReward(DifficultyReward):
    """Perplexity of the fused model over that of the domain's own specialist: 1 where fusing costs the domain nothing.

    It is the difficulty (Eq. 10) with the specialist in place of the start.

    Stage one scores the specialist on the same batches. In stage two the specialists move, so there it is measured on the
    pool, against the specialists' losses before the first step.
    """

    needs_specialists = True

    def __init__(self, args, probe: Probe):
        self.reads_pool = probe.stage == "joint"
        self.watches_specialists = not self.reads_pool
        super().__init__(args, probe)

    def begin(self) -> None:
        if self.reads_pool and self.baseline is None:
            self.baseline = self.probe.losses(own=True)

    def by_domain(self) -> ndarray:
        if self.reads_pool:
            return super().by_domain()
        # batches tell the mean over all tokens together, not one by example
        return np.exp(np.subtract(*self.probe.batch_losses()))
