"""Contamination: records that share a 13-gram of words with an evaluation set (Brown et al., 2020, arXiv 2005.14165, appendix C).

Only hashes are kept, eight bytes for each 13-gram of the evaluation sets, however many records are looked at.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash


LENGTH, SHORTEST = 13, 5


def words(text: str) -> list[str]:
    """Words without case and punctuation, in one form of Unicode."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def grams(text: str) -> Iterator[str]:
    """Every run of 13 words; of a text that is shorter, all its words, if there are five."""
    found = words(text)
    if len(found) >= SHORTEST:
        yield from (" ".join(found[i : i + LENGTH]) for i in range(max(1, len(found) - LENGTH + 1)))


def gram_hashes(texts: Iterable[str]) -> np.ndarray:
    """Sorted hashes of the 13-grams of an evaluation set. Shape (grams,).

    A text of fewer than 13 words is found where it is a whole message, and one of fewer than five is not looked for:
    "yes" is no contamination.
    """
    return np.unique(np.fromiter((_hash(gram) for text in texts for gram in grams(text)), np.uint64))


def _hash(gram: str) -> int:
    # half a surrogate pair is no text, but it does come
    return xxhash.xxh64_intdigest(gram.encode(errors="replace"))


def strings(value: Any) -> Iterator[str]:
    """All texts of the rows of an evaluation set, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings(value.values())
    elif isinstance(value, Iterable):
        for inner in value:
            yield from strings(inner)


def contaminated(record: dict, evaluation: dict[str, np.ndarray]) -> str | None:
    """The first 13-gram that a message shares with an evaluation set.

    Args:
        record: The record.
        evaluation: Name of every evaluation set to its `gram_hashes`.
    """
    for message in record["messages"]:
        found = list(grams(message["content"]))
        hashes = np.fromiter(map(_hash, found), np.uint64, len(found))
        for name, known in evaluation.items():
            if not len(known) or not len(hashes):
                continue
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            hits = np.flatnonzero(known[place] == hashes)
            if len(hits):
                return f"shares with {name}: {found[hits[0]]!r}"
    return None
