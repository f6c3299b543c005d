"""All sparsifiers by the name that a configuration gives."""

from .sparsifier_base_ultrafuser import Sparsifier
from .sparsifier_none_ultrafuser import NoSparsifier


SPARSIFIERS: dict[str, type[Sparsifier]] = {
    "none": NoSparsifier,
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
