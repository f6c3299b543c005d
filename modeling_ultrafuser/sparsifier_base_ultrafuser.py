"""Base of all sparsifiers: which specialists keep a weight at a token."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Sparsifier:
    """Base of all sparsifiers: takes the weights of some specialists away, token by token.

    A sparsifier is one file with one subclass, and one line in `SPARSIFIERS`. A configuration gives its name, or its name
    and a setting, as in "top_p:0.8". `kept` is all that it must define.

    A gate that learns has all weights: what gets none learns nothing.

    Args:
        setting: What follows the colon, or None.

    Raises:
        ValueError: If it is no setting of this sparsifier.
    """

    def __init__(self, setting: str | None = None):
        if setting is not None:
            raise ValueError(f"This sparsifier has no setting, but got {setting!r:.100}. Leave it out.")

    def __call__(self, scores: Tensor) -> Tensor:
        """Gives a score of minus infinity to the specialists that are left out, which is a weight of 0.

        Args:
            scores: A gate's, divided by its temperature. Shape (..., specialists).
        """
        return scores.masked_fill(~self.chosen(scores.softmax(-1)), -math.inf)

    def chosen(self, weights: Tensor) -> Tensor:
        """Returns what `kept` does, and the largest weight, the first of several: weights have to sum to 1.

        Args:
            weights: Non-negative, summing to 1. Shape (..., specialists).

        Returns:
            Booleans. Shape (..., specialists).
        """
        largest = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, weights.argmax(-1, keepdim=True), True)
        # an invalid weight must be seen
        return self.kept(weights) | largest | weights.isnan()

    def kept(self, weights: Tensor) -> Tensor:
        """Chooses the specialists that keep a weight.

        Args:
            weights: Non-negative, summing to 1. Shape (..., specialists).

        Returns:
            Booleans. Shape (..., specialists).
        """
        raise NotImplementedError


def number_of(setting: str | None, kind: type, admits: Callable[[float], bool], rule: str) -> int | float:
    """Reads a sparsifier's setting that is one number.

    Args:
        setting: What follows the colon, or None.
        kind: `int` or `float`.
        admits: Returns whether a number is one of its settings.
        rule: What the setting is, and an example: a sentence.

    Raises:
        ValueError: If it is no such number.
    """
    try:
        number = kind(setting or "")
    except ValueError:
        number = None
    if number is None or not admits(number):
        raise ValueError(f"{rule} But got {setting!r:.100}.")
    return number


def falling(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts weights from the largest to the smallest, the earlier specialist first of equal ones.

    Returns:
        The sorted weights, and where each specialist stands among them, from 0. Shapes (..., specialists).
    """
    ordered, order = torch.sort(weights, dim=-1, descending=True, stable=True)
    return ordered, order.argsort(-1)
