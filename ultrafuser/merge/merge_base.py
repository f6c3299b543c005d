"""Base of all merges."""

from torch import Tensor


class Merge:
    """Base of all merges. A merge is one file with one subclass, and one line in `MERGES`.

    A method is its name, or its name and a setting, as in "ties:0.2". `combined` is all that it must define.

    Args:
        setting: What follows the colon, or None.

    Attributes:
        needs_base: Whether it works on what each specialist changed, so that it needs what all were tuned from.
        averages: Whether it averages changes, so that a factor of 1 suits; where it adds them up, 1 over their number.

    Raises:
        ValueError: If it is no setting of this merge.
    """

    needs_base = True
    averages = False

    def __init__(self, setting: str | None = None):
        if setting is not None:
            raise ValueError(f"This merge has no setting, but got {setting!r:.100}. Leave it out.")

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        """Combines one parameter's changes.

        Args:
            changes: One per specialist, in float32, of the parameter's shape.
            weights: Factor of each. Shape (specialists,).

        Returns:
            The merged model's change, of the parameter's shape.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        """Describes settings in a table's note. Empty without any."""
        return ""
