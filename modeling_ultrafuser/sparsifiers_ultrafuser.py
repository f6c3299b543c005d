"""All sparsifiers by the name that a configuration gives."""

from .sparsifier_base_ultrafuser import Sparsifier
from .sparsifier_none_ultrafuser import NoSparsifier
from .sparsifier_ratio_ultrafuser import RatioSparsifier
from .sparsifier_threshold_ultrafuser import ThresholdSparsifier
from .sparsifier_top_k_ultrafuser import TopKSparsifier
from .sparsifier_top_p_ultrafuser import TopPSparsifier


SPARSIFIERS: dict[str, type[Sparsifier]] = {
    "none": NoSparsifier,
    "top_k": TopKSparsifier,
    "top_p": TopPSparsifier,
    "ratio": RatioSparsifier,
    "threshold": ThresholdSparsifier,
}
NONE = "none"


def sparsifier(word: str) -> Sparsifier:
    """Makes a sparsifier.

    Args:
        word: A name in `SPARSIFIERS`; a colon and its setting, if it has one.

    Raises:
        ValueError: If there is no such sparsifier, or it has no such setting.
    """
    name, colon, setting = word.partition(":") if isinstance(word, str) else ("", "", "")
    if name not in SPARSIFIERS:
        raise ValueError(f"Unknown sparsifier {word!r:.100}. Choose one of {list(SPARSIFIERS)}.")
    return SPARSIFIERS[name](setting if colon else None)
