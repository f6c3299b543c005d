"""The "gradient" reward of MultiDDS-S (Wang et al., 2020, https://arxiv.org/abs/2004.06748)."""

from numpy import ndarray

from ..probe import Probe
from .reward_base import Reward
from .reward_similarity import cosines


class GradientReward(Reward):
    """Cosines of gradients on two halves of the pool: how well a step on each domain serves all domains."""

    def __init__(self, args, probe: Probe):
        if probe.sharded:
            raise ValueError(
                "mix_reward='gradient' compares whole gradients, which no process holds under FSDP or DeepSpeed. Choose "
                "another reward, or train with DDP."
            )
        super().__init__(args, probe)
        if args.mix_probe < 2:
            raise ValueError("mix_reward='gradient' compares two halves of the pool. Take mix_probe=2 or more.")

    def by_domain(self) -> ndarray:
        return gradient_cosine(*(self.probe.gradients(half) for half in (0, 1)))


def gradient_cosine(dev: ndarray, train: ndarray) -> ndarray:
    """Reward: how well a step on each domain serves all domains (MultiDDS-S; Wang et al., 2020, arXiv 2004.06748).

    Args:
        dev: Gradient on held-out examples of each domain. Shape (domains, parameters).
        train: Gradient on training examples of each domain. Shape (domains, parameters).

    Returns:
        Mean cosine of a domain's training gradient to every held-out gradient, from -1 to 1. Shape (domains,).
    """
    return cosines(train, dev).mean(1)
