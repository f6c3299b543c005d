"""Divides what is generated into training and held-out parts by content, so that no draw can mix them."""

import hashlib
from random import Random
from typing import Any


HELD_OUT = 0.1  # share of the contents


def held_out(*content: Any, share: float = HELD_OUT) -> bool:
    """Tells whether this content belongs to the held-out part. The same for every seed."""
    first = hashlib.sha256(repr(content).encode()).digest()[:4]
    return int.from_bytes(first, "big") < share * 2**32


def draw(make, random: Random, wanted: bool, tries: int = 10_000):
    """Draws until the content lies in the wanted part.

    Args:
        make: Function of a source of random numbers that returns (content, item).
        random: The source.
        wanted: True for the held-out part.
        tries: How often, at most.

    Raises:
        RuntimeError: If none came.
    """
    for _ in range(tries):
        content, item = make(random)
        if held_out(*content) == wanted:
            return item
    raise RuntimeError(f"{tries} draws gave nothing for the {'held-out' if wanted else 'training'} part.")
