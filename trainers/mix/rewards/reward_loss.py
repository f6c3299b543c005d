"""The "loss" reward: the mean loss of each domain's training batches."""

from numpy import ndarray

from .reward_base import Reward


class LossReward(Reward):
    """Mean loss of the domain's tokens since the last update, in nats."""

    reads_pool = False
    is_loss = True

    def by_domain(self) -> ndarray:
        return self.probe.batch_losses()[0]
