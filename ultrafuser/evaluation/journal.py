"""A journal of finished work: what is in it is never done, or paid for, again."""

import hashlib
import json
import os
from pathlib import Path


class Journal:
    """JSON lines, each on the disk before the next piece of work is called finished.

    The first line holds the settings that the work was done with. A line that a killed process left half written is
    cut off. Use it as a context manager.

    Attributes:
        rows: Finished rows by `id` and `part`, which is a turn or an order.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        """Opens the journal, or begins one.

        Raises:
            ValueError: If it was begun with other settings, naming those that differ.
        """
        self.path, self.rows = path, {}
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))
        if path.exists() and path.stat().st_size:
            found, self.rows = read_journal(path)
            _check_settings(path, found, settings)
            self._file = path.open("ab")
        else:
            self._file = path.open("ab")
            self._write(settings)

    def add(self, id: str, part: int, **result) -> None:
        """Writes down a finished piece of work."""
        row = {"id": id, "part": part, **result}
        self._write(row)
        self.rows[id, part] = row

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def read_journal(path: Path) -> tuple[dict, dict]:
    """The settings of a journal, and its rows by `id` and `part`.

    Raises:
        ValueError: If the file is no journal.
    """
    try:
        settings, *rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        return settings, {(row["id"], row["part"]): row for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no journal of answers or judgements: {error!r}.") from error


def _check_settings(path: Path, found: dict, wanted: dict) -> None:
    if differ := [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]:
        changes = "; ".join(f"{key}: {found.get(key)!r} then, {wanted.get(key)!r} now" for key in differ)
        raise ValueError(
            f"One journal holds work done with one set of settings, or its numbers would mean nothing, but "
            f"{str(path)!r} was begun with others ({changes}). Choose another folder, or delete that file."
        )


def weights_digest(folder: Path) -> str | None:
    """A fingerprint of a folder's files of weights, None without any: one trained on, or saved anew, has another."""
    found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
    return digest(found) if found else None


def digest(value) -> str:
    """A short fingerprint of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
