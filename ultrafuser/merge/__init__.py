"""Weight merges: N specialists of one shape into one model. Baselines, not products."""

from .merge_average import AverageMerge
from .merge_base import Merge
from .merge_dare import DareMerge
from .merge_task_arithmetic import TaskArithmeticMerge
from .merge_ties import TiesMerge


MERGES: dict[str, type[Merge]] = {
    "average": AverageMerge,
    "task_arithmetic": TaskArithmeticMerge,
    "ties": TiesMerge,
    "dare": DareMerge,
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
