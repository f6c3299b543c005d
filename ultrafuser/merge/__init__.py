"""Weight merges: N specialists of one shape into one model."""

from .merge_average import AverageMerge
from .merge_base import Merge, NotMergeableError
from .merge_breadcrumbs import BreadcrumbsMerge
from .merge_dare import DareMerge
from .merge_layer_swap import LayerSwapMerge
from .merge_model_stock import ModelStockMerge
from .merge_pcb import PcbMerge
from .merge_regmean import RegMeanMerge
from .merge_task_arithmetic import TaskArithmeticMerge
from .merge_ties import TiesMerge


MERGES: dict[str, type[Merge]] = {
    "average": AverageMerge,
    "task_arithmetic": TaskArithmeticMerge,
    "ties": TiesMerge,
    "dare": DareMerge,
    "breadcrumbs": BreadcrumbsMerge,
    "pcb": PcbMerge,
    "model_stock": ModelStockMerge,
    "regmean": RegMeanMerge,
    "layer_swap": LayerSwapMerge,
}


def merge_method(word: str) -> Merge:
    """Makes a merge.

    Args:
        word: A name in `MERGES`; a colon and its setting, if it has one.

    Raises:
        ValueError: If there is no such merge, or it has no such setting.
    """
    name, colon, setting = word.partition(":") if isinstance(word, str) else ("", "", "")
    if name not in MERGES:
        raise ValueError(f"Unknown merge {word!r:.100}. Choose one of {sorted(MERGES)}.")
    return MERGES[name](setting if colon else None)


def fitting_merges(names: list[str], layers: int) -> list[str]:
    """Lists the merges that fit specialists of these names and so many layers, whose shapes agree."""
    return [name for name in MERGES if _fits(merge_method(name), names, layers)]


def _fits(method: Merge, names: list[str], layers: int) -> bool:
    try:
        method.table(names, layers)
    except NotMergeableError:
        return False
    return True
