"""Weight merges: N specialists of one shape into one model. Baselines, not products."""

from .merge_average import AverageMerge
from .merge_base import Merge
from .merge_dare import DareMerge
from .merge_task_arithmetic import TaskArithmeticMerge
from .merge_ties import TiesMerge


MERGES: dict[str, Merge] = {
    "average": AverageMerge(),
    "task_arithmetic": TaskArithmeticMerge(),
    "ties": TiesMerge(),
    "dare": DareMerge(),
}
