"""Base of all merges."""

from collections.abc import Callable

import torch
from torch import Tensor

from .coefficients import Coefficients


class NotMergeableError(ValueError):
    """These specialists cannot be merged that way; the message says why."""


class Merge:
    """Base of all merges. A merge is one file with one subclass, and one line in `MERGES`.

    A method is its name, or its name and a setting, as in "ties:0.2". `combined` is all that it must define.

    Args:
        setting: What follows the colon, or None.

    Attributes:
        needs_base: Whether it works on what each specialist changed, so that it needs what all were tuned from.
        averages: Whether it averages changes, so that a factor of 1 suits; where it adds them up, 1 over their number.
        adds: Whether it only adds up weighted changes, so that a specialist with all the weight comes out to the bit.
        scales: Whether one factor of all changes alters what comes out.
        reads_inputs: Whether `combined` takes a third argument: of a linear layer, the mean inner products of its inputs
            under each specialist, shapes (in, in); None of any other parameter.

    Raises:
        ValueError: If it is no setting of this merge.
    """

    needs_base = True
    averages = False
    adds = False
    scales = True
    reads_inputs = False

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

    def table(self, names: list[str], layers: int) -> Coefficients | None:
        """Makes the table of coefficients where the merge is one; None where any table does.

        Raises:
            NotMergeableError: If these specialists have none.
        """
        return None

    def default(self, specialists: int) -> float:
        """Returns the factor of every change where none is given."""
        return 1.0 if self.averages or not self.scales else 1 / specialists

    def merged(
        self, origin: Tensor, tensors: list[Tensor], weights: list[float], inputs: list[Tensor] | None = None
    ) -> Tensor:
        """Merges one parameter.

        Args:
            origin: The base's.
            tensors: Each specialist's, of the same shape.
            weights: Factor of each.
            inputs: As for `combined`, if it reads inputs.

        Returns:
            The merged parameter, in float32; that of the only specialist with a weight as it is, if this only adds.
        """
        if self.adds and sorted(weights) == [0.0] * (len(weights) - 1) + [1.0]:
            return tensors[weights.index(1.0)]
        # 16 bits are too coarse for small changes
        origin = origin.float()
        changes = [t.float() - origin for t in tensors]
        more = (inputs,) if self.reads_inputs else ()
        return origin + self.combined(changes, torch.tensor(weights, device=origin.device), *more)

    def __str__(self) -> str:
        """Describes settings in a table's note. Empty without any."""
        return ""


def weighted_sum(changes: list[Tensor], weights: Tensor) -> Tensor:
    """Adds up changes, each times its weight."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total += weight * change
    return total


def numbers_of(setting: str, count: int, kind: type, admits: Callable[[float], bool], rule: str) -> list[int | float]:
    """Reads a setting that is several numbers with commas between them.

    Raises:
        ValueError: If it is no such setting.
    """
    try:
        numbers = [kind(number) for number in setting.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(admits, numbers)):
        raise ValueError(f"{rule} But got {setting!r:.100}.")
    return numbers
