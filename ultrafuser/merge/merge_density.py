"""Base of merges that keep a share of each change."""

from modeling_ultrafuser.sparsifier_base_ultrafuser import number_of

from .merge_base import Merge


class DensityMerge(Merge):
    """Keeps a share of the numbers of each change, its density: half of them, or what follows the colon."""

    def __init__(self, setting: str | None = None):
        rule = "A density is the share of each change that a merge keeps, above 0 and up to 1, as in ties:0.2."
        self.density = number_of("0.5" if setting is None else setting, float, lambda share: 0 < share <= 1, rule)

    def __str__(self) -> str:
        return f"density {self.density:g}"
