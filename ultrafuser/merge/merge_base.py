"""Base of all merges."""

from torch import Tensor


DENSITY = 0.5  # share of each change that TIES keeps and DARE does not drop


class Merge:
    """Base of all merges. A merge is one file with one subclass, and one line in `MERGES`.

    Attributes:
        needs_base: Whether it works on what each specialist changed, so that it needs what all were tuned from.
        averages: Whether it averages changes, so that a factor of 1 suits; where it adds them up, 1 over their number.
    """

    needs_base = True
    averages = False

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        """Combines one parameter's changes.

        Args:
            changes: One per specialist, in float32, of the parameter's shape.
            weights: Factor of each. Shape (specialists,).

        Returns:
            The merged model's change, of the parameter's shape.
        """
        raise NotImplementedError
