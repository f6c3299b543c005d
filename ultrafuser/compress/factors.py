"""Truncated singular value decompositions of changes of weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from modeling_ultrafuser.refusals_ultrafuser import Refusal


# beyond it a few singular vectors are approximated, if a rank is given
WIDEST = 4096
OVERSAMPLING, ITERATIONS = 32, 4


class Limits(NamedTuple):
    """Limits what is kept of each change.

    Attributes:
        rank: Highest rank of a layer. Default: full.
        error: Largest relative error of a layer, in the Frobenius norm; the least rank that meets it is taken.
    """

    rank: int | None = None
    error: float | None = None

    def check(self) -> None:
        """Rejects limits that cannot be.

        Raises:
            ValueError: Naming the option.
        """
        if self.rank is None and self.error is None:
            raise Refusal(
                "neither a rank nor an error is given",
                "A change is cut to a rank, or to the least rank that meets a relative error",
                "Pass --rank 32, say, or --error 0.3, or both: the error at most at that rank.",
                about="rank",
            )
        if self.rank is not None and self.rank < 1:
            raise Refusal(
                f"the rank is {self.rank}", "A change that is kept has a rank of 1 or more", "Pass --rank 32, say."
            )
        if self.error is not None and not 0 < self.error < 1:
            raise Refusal(
                f"the error is {self.error}",
                "It is a share of each layer's change, above 0, which full rank alone would meet, and below 1, which "
                "keeping nothing meets",
                "Pass --error 0.3, say.",
            )


class Factors(NamedTuple):
    """A change of a layer as a product of two matrices.

    Attributes:
        left: B, singular values in it. Shape (out, rank).
        right: A. Shape (rank, in).
        error: Frobenius norm of what is lost, over that of the change.
        size: Frobenius norm of the change.
    """

    left: Tensor
    right: Tensor
    error: float
    size: float


def factors(change: Tensor, limits: Limits) -> Factors | None:
    """Cuts a change to its largest singular values (Eckart and Young, 1936). None if nothing has changed.

    Args:
        change: In float32. Shape (out, in).
        limits: Of rank and error.
    """
    size = change.norm().item()
    if size == 0:
        return None
    most = min(limits.rank or min(change.shape), *change.shape)
    if limits.rank is not None and min(change.shape) > WIDEST:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(change, min(most + OVERSAMPLING, *change.shape), ITERATIONS)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    rank = min(most, least_rank(values, size, limits.error or 0.0))
    left, right = left[:, :rank] * values[:rank], right[:rank]
    lost = (change - left @ right).norm().item()
    return Factors(left.contiguous().cpu(), right.contiguous().cpu(), lost / size, size)


def least_rank(values: Tensor, size: float, error: float) -> int:
    """Counts the singular values without which more than `error` of a change is lost.

    Args:
        values: In falling order; those that rounding alone makes are not counted. Shape (values,).
        size: Frobenius norm of the change.
        error: Relative error that is allowed.
    """
    real = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    lost = (size**2 - values.double().square().cumsum(0)).clamp(min=0).sqrt()
    meeting = (lost <= error * size).nonzero()
    return min(real, int(meeting[0]) + 1) if len(meeting) else real
