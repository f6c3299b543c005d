"""The "gradient" reward of MultiDDS-S (Wang et al., 2020, https://arxiv.org/abs/2004.06748)."""

from numpy import ndarray

from ..probe import Probe
from .reward_base import Reward
from .reward_similarity import cosines


class GradientReward(Reward):
    """Cosines of gradients on two halves of the pool: how well a step on each domain serves all domains.

    Of a domain's gradient on one half, the mean cosine to all domains' on the other: between -1 and 1. With a target, the
    cosine to the target's alone, which FLAD rewards (Albalak et al., 2023, https://arxiv.org/abs/2302.00674).
    """

    def __init__(self, args, probe: Probe):
        if probe.sharded:
            raise ValueError(
                "mix_reward='gradient' compares whole gradients, which no process holds under FSDP or DeepSpeed. Choose "
                "another reward, or train with DDP."
            )
        super().__init__(args, probe)
        if args.mix_probe < 2:
            raise ValueError("mix_reward='gradient' compares two halves of the pool. Take mix_probe=2 or more.")

    def measure(self) -> ndarray:
        held_out, train = (self.probe.gradients(half) for half in (0, 1))
        found = cosines(train, held_out)
        return found.mean(1) if self.target is None else found[:, self.target]
