"""The wide head: the specialists' heads side by side, and what bounds their logits."""

from collections.abc import Iterator

from torch import Tensor

from .families_ultrafuser import soft_cap
from .readers_ultrafuser import reader_of


def specialist_parts(states: Tensor, config) -> Iterator[tuple[Tensor, slice, float | None]]:
    """Yields, for each specialist, its states, its columns of the wide head, and what bounds its logits."""
    own = states.split([c.hidden_size for c in config.specialists], -1)
    yield from zip(own, reader_of(config).head_columns(config), map(soft_cap, config.specialists), strict=True)
