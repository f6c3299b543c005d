"""Base of all sparsifiers: which specialists keep a weight at a token."""

import math

from torch import Tensor


class Sparsifier:
    """Base of all sparsifiers: takes the weights of some specialists away, token by token.

    A sparsifier is one file with one subclass, and one line in `SPARSIFIERS`. A configuration gives its name, or its name
    and a setting, as in "top_p:0.8". `kept` is all that it must define.

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
        weights = scores.softmax(-1)
        # whatever a sparsifier leaves out, the weights have to sum to 1
        kept = self.kept(weights) | (weights == weights.amax(-1, keepdim=True))
        return scores.masked_fill(~kept, -math.inf)

    def kept(self, weights: Tensor) -> Tensor:
        """Chooses the specialists that keep a weight.

        Args:
            weights: Non-negative, summing to 1. Shape (..., specialists).

        Returns:
            Booleans. Shape (..., specialists).
        """
        raise NotImplementedError
