"""Exact and near duplicates among records of which only an index on disk is kept.

Near duplicates share most of their shingles, runs of five tokens: MinHash signatures cut into bands find candidates
(Broder, 1997; locality-sensitive hashing as in Leskovec et al., "Mining of Massive Datasets", chapter 3), and the
Jaccard similarity of the shingles themselves decides.
"""

import functools
import re
import sqlite3
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH


DUPLICATES = ("duplicate", "near_duplicate")
PERMUTATIONS, SHINGLE = 128, 5
# so many candidates are compared, those with most bands in common first: boilerplate cannot make one record cost a set
MOST_CANDIDATES = 50


class Fingerprint(NamedTuple):
    """Fingerprint of a record: a digest of the normalised text, a key for each band, and the sorted hashes of its shingles."""

    digest: bytes
    bands: list[int]
    shingles: bytes


def fingerprint(record: dict, threshold: float = 0.7) -> Fingerprint:
    """The fingerprint of all messages together, without regard to case, width of characters and white space."""
    text = unicodedata.normalize("NFKC", "\n".join(m["content"] for m in record["messages"])).casefold()
    # half a surrogate pair is no text, but it does come
    tokens = [token.encode(errors="replace") for token in re.findall(r"\w+|[^\w\s]", text)]
    runs = {b" ".join(tokens[i : i + SHINGLE]) for i in range(max(1, len(tokens) - SHINGLE + 1))}
    shingles = np.fromiter(map(xxhash.xxh32_intdigest, runs), np.uint32, len(runs))
    sketch = MinHash(PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    sketch.update_batch(shingles)
    number, rows = bands(threshold)
    # SQLite's integers have a sign
    keys = [
        xxhash.xxh64_intdigest(sketch.hashvalues[i * rows : (i + 1) * rows].tobytes(), seed=i) - 2**63
        for i in range(number)
    ]
    return Fingerprint(xxhash.xxh128_digest(b" ".join(tokens)), keys, np.unique(shingles).tobytes())


@functools.cache
def bands(threshold: float) -> tuple[int, int]:
    """Chooses the bands and rows of the signature: candidates are compared, so a missed one weighs more."""
    # with so few permutations, higher thresholds would have a single band
    lsh = MinHashLSH(min(threshold, 0.9), PERMUTATIONS, weights=(0.1, 0.9))
    return lsh.b, lsh.r


@functools.cache
def _permutations():
    return MinHash(PERMUTATIONS, scheme="affine32").permutations


def jaccard(a: bytes, b: bytes) -> float:
    """Shared shingles of two fingerprints as a part of all of them."""
    a, b = np.frombuffer(a, np.uint32), np.frombuffer(b, np.uint32)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


class DuplicateIndex:
    """Fingerprints of the records kept so far, in an SQLite file. Use it as a context.

    In memory it holds SQLite's page cache, 64 MB at most, for any number of records; on disk about a kilobyte and four
    bytes per token for each.

    Args:
        path: The file, which must not be there yet.
        threshold: Jaccard similarity from which on a record is a near duplicate, above 0 and up to 1.

    Raises:
        ValueError: If the threshold is none.
    """

    def __init__(self, path: Path | str, threshold: float = 0.7):
        if not 0 < threshold <= 1:
            raise ValueError(
                f"The threshold is a Jaccard similarity, a share of shingles, above 0 and up to 1, but got {threshold}."
            )
        self.threshold = threshold
        self.connection = sqlite3.connect(path, isolation_level=None)
        # it is made anew by every run, so it need not survive one
        self.connection.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -64000;
            CREATE TABLE digests (digest BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID;
            CREATE TABLE bands (key INTEGER, row INTEGER, PRIMARY KEY (key, row)) WITHOUT ROWID;
            CREATE TABLE shingles (row INTEGER PRIMARY KEY, hashes BLOB);
            """
        )
        self.connection.execute("BEGIN")

    def __enter__(self) -> "DuplicateIndex":
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()

    def exact(self, found: Fingerprint) -> int | None:
        """The record added before that has the same normalised text."""
        hit = self.connection.execute("SELECT row FROM digests WHERE digest = ?", (found.digest,)).fetchone()
        return hit and hit[0]

    def near(self, found: Fingerprint) -> tuple[int, float] | None:
        """The most similar of the records added before, and its Jaccard similarity, if that reaches the threshold."""
        candidates = self.connection.execute(
            f"""SELECT row, hashes FROM shingles JOIN (
                SELECT row, count(*) AS shared FROM bands WHERE key IN ({",".join("?" * len(found.bands))})
                GROUP BY row ORDER BY shared DESC, row LIMIT {MOST_CANDIDATES}) USING (row)""",
            found.bands,
        )
        scored = [(jaccard(found.shingles, hashes), -row) for row, hashes in candidates]
        best, row = max(scored, default=(0.0, 0))
        return (-row, best) if best >= self.threshold else None

    def repeats(self, row: int, found: Fingerprint, skip: Collection[str] = ()) -> tuple[str, str] | None:
        """Returns which of `DUPLICATES` a record is, and why; None if it is none, and then adds it.

        Args:
            row: The record's row.
            found: Its fingerprint.
            skip: Those of `DUPLICATES` that are not looked for.
        """
        if "duplicate" not in skip and (other := self.exact(found)):
            return "duplicate", f"same as row {other}"
        if "near_duplicate" not in skip and (hit := self.near(found)):
            return "near_duplicate", f"like row {hit[0]}, Jaccard similarity {hit[1]:.2f}"
        self.add(row, found)
        return None

    def add(self, row: int, found: Fingerprint) -> None:
        """Adds a record that is kept."""
        self.connection.execute("INSERT OR IGNORE INTO digests VALUES (?, ?)", (found.digest, row))
        self.connection.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, row) for key in found.bands])
        self.connection.execute("INSERT INTO shingles VALUES (?, ?)", (row, found.shingles))
