"""Which example is drawn next."""

import random
from collections.abc import Iterator

from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """Draws from every domain in turn, so that each batch holds the same number of examples from each.

    The draw number alone decides the domain and the place in that domain's stream, so the stream is the same after a
    resume and for any number of processes. A domain that runs out begins again in a new order: small domains are
    repeated, never starved.

    Args:
        domains: Domain of each example. Length: number of examples.
        seed: Same seed, same draws. All processes must use the same one.
    """

    def __init__(self, domains: list, seed: int = 0):
        names = sorted(set(domains))
        self.members = [[i for i, d in enumerate(domains) if d == name] for name in names]
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """An epoch is as many draws as there are examples, rounded down to full turns."""
        turns = sum(map(len, self.members)) // len(self.members)
        return max(turns, 1) * len(self.members)

    def set_epoch(self, epoch: int) -> None:
        """Continues the stream where the epochs before left it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        orders = {}
        for draw in range(self.epoch * len(self), (self.epoch + 1) * len(self)):
            place, domain = divmod(draw, len(self.members))
            members = self.members[domain]
            cycle, offset = divmod(place, len(members))
            if orders.get(domain, (None,))[0] != cycle:
                orders[domain] = (cycle, random.Random(f"{self.seed} {domain} {cycle}").sample(members, len(members)))
            yield orders[domain][1][offset]
