"""Base of all samplers: one stream of examples for all processes, a function of a seed and of the mixes in force."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class DomainSampler(Sampler[int]):
    """Draws each batch from the domains, in the proportions of the mix in force.

    Base of all samplers. A sampler is one file with one subclass, and one line in `SAMPLERS`: it defines `quotas`.

    Within a domain every example is drawn once before any is drawn again, in another order. All of it is a function of
    the seed, the number of the batch and the mixes: the stream is the same for any number of processes or workers, and
    after a resume. Batches are those of one optimizer step, all processes and accumulated steps together.

    Args:
        domains: Domain of each example. Length: number of examples.
        batch_size: Examples per optimizer step.
        mix: Share of each domain, in the order of `names`. Default: equal shares.
        seed: Same seed, same draws. All processes must use the same one.
        names: Order of the domains in the mix. Default: alphabetical.
    """

    def __init__(
        self,
        domains: Sequence[str],
        batch_size: int,
        mix: Sequence[float] | np.ndarray | None = None,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ):
        self.names = sorted(set(domains)) if names is None else list(names)
        self.members = [[i for i, d in enumerate(domains) if d == name] for name in self.names]
        self.batch_size = batch_size
        self.seed = seed
        self.offset = random.Random(seed).random()
        mix = np.full(len(self.names), 1 / len(self.names)) if mix is None else np.asarray(mix, float)
        self.mixes = [(0, mix.tolist())]  # each from the batch of that number on
        self.epoch = 0
        self.batches_drawn = 0
        self._counted = (0, np.zeros(len(self.names), int))

    @property
    def batches_per_epoch(self) -> int:
        """As many as the examples fill, one at least: with a mix, an epoch says nothing about any one domain."""
        return max(sum(map(len, self.members)) // self.batch_size, 1)

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Continues the stream where the epochs before left it."""
        self.epoch = epoch

    def mix(self, batch: int) -> np.ndarray:
        """The mix in force for a batch. Shape (domains,)."""
        return np.array(next(mix for start, mix in reversed(self.mixes) if start <= batch))

    def set_mix(self, mix: Sequence[float] | np.ndarray, start: int) -> None:
        """Puts a mix in force from the batch of number `start` on.

        Raises:
            RuntimeError: If that batch has been drawn already, for then it would depend on how far a loader reads ahead.
        """
        if start < self.batches_drawn:
            raise RuntimeError(
                f"A new mix must begin at a batch that is not drawn yet, but it was to begin at batch {start} and the "
                f"data loader has read ahead to batch {self.batches_drawn}. Raise `mix_delay`, or lower "
                f"`dataloader_num_workers` or `dataloader_prefetch_factor`."
            )
        self.restore([e for e in self.mixes if e[0] < start] + [(start, np.asarray(mix, float).tolist())])

    def quotas(self, batch: int) -> np.ndarray:
        """Returns how many examples of each domain a batch holds, `batch_size` in all. Shape (domains,).

        It depends on the number of the batch, the seed and `mix(batch)` alone, and is the same in every process.
        """
        raise NotImplementedError

    def counts(self, batches: int) -> np.ndarray:
        """Counts the examples of each domain in the first batches. Shape (domains,)."""
        done, counts = self._counted
        if batches < done:
            done, counts = 0, np.zeros(len(self.names), int)
        for batch in range(done, batches):
            counts = counts + self.quotas(batch)
        # batches that are drawn do not change, so the next call can go on from here
        self._counted = (batches, counts)
        return counts

    def epochs(self, batches: int) -> np.ndarray:
        """Returns how often the first batches hold each domain whole: examples drawn / examples there are. Shape (domains,)."""
        return self.counts(batches) / [len(members) for members in self.members]

    def restore(self, mixes: list[tuple[int, list[float]]]) -> None:
        """Takes over mixes, each with its first batch, such as those of an interrupted run: the stream follows."""
        self.mixes = [(start, mix) for start, mix in mixes]
        # what is drawn by now does not change with a mix to come
        if self._counted[0] > self.mixes[-1][0]:
            self._counted = (0, np.zeros(len(self.names), int))

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.batches_per_epoch
        drawn = self.counts(first).copy()
        orders = [(-1, []) for _ in self.names]
        for batch in range(first, first + self.batches_per_epoch):
            self.batches_drawn = max(self.batches_drawn, batch + 1)
            quotas = self.quotas(batch)
            # spread evenly over the batch, so that each process and each accumulated step gets its share too
            turns = sorted(((j + 0.5) / n, d) for d, n in enumerate(quotas) for j in range(n))
            for _, domain in turns:
                cycle, place = divmod(int(drawn[domain]), len(self.members[domain]))
                if orders[domain][0] != cycle:
                    orders[domain] = (cycle, self._order(domain, cycle))
                drawn[domain] += 1
                yield orders[domain][1][place]

    def _order(self, domain: int, cycle: int) -> list[int]:
        members = self.members[domain]
        return random.Random(f"{self.seed} {self.names[domain]} {cycle}").sample(members, len(members))
