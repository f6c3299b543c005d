"""Layer swapping."""

from torch import Tensor

from .coefficients import Coefficients
from .merge_base import Merge, NotMergeableError, numbers_of, weighted_sum


class LayerSwapMerge(Merge):
    """Puts the outer layers of a second specialist around the middle of a first (Bandarkar et al., 2025, arXiv 2410.01335).

    In the paper the first has learned a task in English and the second a language. "layer_swap:5,4" takes five layers at the
    beginning, with the embeddings, and four at the end, with the last norm and the head. Without numbers it is a sixth of
    the layers at either end, which is our choice. One layer on either side is the mean of both.
    """

    needs_base = False
    scales = False
    adds = True

    def __init__(self, setting: str | None = None):
        rule = "Layer swapping takes a number of layers at the beginning and at the end, as in layer_swap:5,4."
        self.ends = None if setting is None else numbers_of(setting, 2, int, lambda number: number >= 0, rule)

    def table(self, names: list[str], layers: int) -> Coefficients:
        if len(names) != 2:
            raise NotMergeableError(
                f"Layer swapping puts layers of a second specialist around those of a first, but there are {len(names)}: "
                f"{names}. Name two."
            )
        first, last = self.ends or (layers // 6, layers // 6)
        if first + last + 3 > layers:
            raise NotMergeableError(
                f"Layer swapping keeps a layer of the first specialist between two that are averaged, but {first} and {last} "
                f"of {layers} layers leave fewer than three. Take fewer."
            )
        outer = [1.0] * (first + 1) + [0.5] + [0.0] * (layers - first - last - 2) + [0.5] + [1.0] * (last + 1)
        return Coefficients(names, [[1 - share, share] for share in outer])

    def combined(self, changes: list[Tensor], weights: Tensor) -> Tensor:
        return weighted_sum(changes, weights)

    def __str__(self) -> str:
        return "" if self.ends is None else "{} and {} layers swapped".format(*self.ends)
