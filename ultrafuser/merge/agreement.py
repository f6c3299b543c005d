"""Measures how far the changes of specialists agree, layer by layer, which tells whether a merge is worth a try."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from rich.table import Column, Table
from torch import Tensor

from trainers.progress import Progress

from .coefficients import row_names, row_of
from .merge_base import NotMergeableError
from .sources import Sources


@dataclass
class Agreement:
    """Sums over the parameters of a row of the model.

    Attributes:
        products: Inner products of changes. Shape (specialists, specialists).
        same: Numbers that two specialists changed in one direction, over all pairs.
        both: Numbers that two specialists changed, over all pairs.
        base: Sum of squares of the base's numbers.
    """

    products: Tensor
    same: int = 0
    both: int = 0
    base: float = 0.0

    def add(self, origin: Tensor, changes: list[Tensor]) -> None:
        """Counts a parameter."""
        flat = torch.stack([change.flatten() for change in changes])
        self.products += (flat @ flat.T).double()
        self.base += origin.double().square().sum().item()
        for one, other in combinations(flat, 2):
            self.same += (one * other > 0).sum().item()
            self.both += (one * other != 0).sum().item()

    @property
    def cosine(self) -> float:
        """Mean over pairs; NaN if one has changed nothing."""
        norms = self.products.diagonal().sqrt()
        pairs = list(combinations(range(len(norms)), 2))
        return sum((self.products[i, j] / (norms[i] * norms[j])).item() for i, j in pairs) / len(pairs)

    @property
    def signs(self) -> float:
        """Share of what two changed that they changed in one direction; NaN if there is nothing."""
        return self.same / self.both if self.both else float("nan")

    @property
    def sizes(self) -> list[float]:
        """Each specialist's change, relative to the base."""
        return (self.products.diagonal() / max(self.base, 1e-30)).sqrt().tolist()


def agreement(sources: Sources) -> dict[str, Agreement]:
    """Compares what specialists changed, row by row.

    Raises:
        NotMergeableError: If there is no base, or one specialist alone.
    """
    if sources.base is None or len(sources.specialists) < 2:
        raise NotMergeableError(
            f"Changes of several specialists are compared, counted from what all were tuned from, but there are "
            f"{len(sources.specialists)} specialists and {'a' if sources.base else 'no'} base. Pass --base and two or more."
        )
    sources.check_numbers()
    names = row_names(sources.layers)
    found = {name: Agreement(torch.zeros(2 * [len(sources.specialists)], dtype=torch.float64)) for name in names}
    with Progress("comparing", len(sources.base.header)) as progress:
        for key in sources.base.header:
            origin = sources.base.tensor(key).float()
            changes = [c.tensor(key).float() - origin for c in sources.specialists.values() if key in c.header]
            if len(changes) == len(sources.specialists):
                found[names[row_of(key, sources.layers)]].add(origin, changes)
            progress.add()
    return {name: about for name, about in found.items() if about.base}


def table(found: dict[str, Agreement], names: list[str]) -> Table:
    """Shows the agreement of each row of the model."""
    numbers = [Column(name, justify="right") for name in ("cosine", "same sign", *(f"change of {n}" for n in names))]
    shown = Table(
        "", *numbers, caption="Chance is a cosine of 0 and 50 % of one sign. Changes are relative to the base."
    )
    for name, about in found.items():
        shown.add_row(name, *_cells(about))
    return shown


def _cells(about: Agreement) -> Iterator[str]:
    yield f"{about.cosine:.3f}"
    yield f"{about.signs:.1%}"
    yield from (f"{size:.2%}" for size in about.sizes)
