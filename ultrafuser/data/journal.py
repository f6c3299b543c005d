"""What a teacher has said and been paid for, on disk before it is used, so that it is never asked for again."""

import fcntl
import hashlib
import json
import os
from pathlib import Path


class Journal:
    """Replies by the key of their request, one JSON line each, only ever added to.

    A line is on the disk when `add` returns. A last line that a killed process left half written is cut off when the
    journal is opened. Only where each reply begins is held in memory. Use it as a context manager.

    Attributes:
        tokens_in: Prompt tokens of all replies.
        tokens_out: Reply tokens of all replies.
    """

    def __init__(self, path: Path) -> None:
        """Opens the journal, or begins one.

        Raises:
            ValueError: If another process writes to it, or a line before the last is damaged.
        """
        self.path, self.tokens_in, self.tokens_out = path, 0, 0
        self._places: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        self._reader = path.open("rb")

    def _read(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"Two runs that write one journal would pay twice, but {str(self.path)!r} is in use. Wait for the "
                f"other run, or end it."
            ) from error
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._count(json.loads(line), end)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"Each line of a journal is a reply, but line {number} of {str(self.path)!r} is damaged: "
                        f"{line[:80]!r}. Take that line out; its request will be made again."
                    ) from error
                end += len(line)
        os.truncate(self.path, end)
        self._end = end

    def _count(self, entry: dict, place: int) -> None:
        self._places[entry["key"]] = place
        self.tokens_in += entry["tokens_in"]
        self.tokens_out += entry["tokens_out"]

    def add(self, entry: dict) -> None:
        """Writes down a reply: a dict with `key`, `tokens_in`, `tokens_out` and whatever else is to be kept."""
        line = json.dumps(entry).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"The journal {str(self.path)!r} could be written in part only: is the disk full?")
            os.fsync(self._file.fileno())
        except OSError:
            # what comes next must not run into half a line
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._count(entry, self._end)
        self._end += len(line)

    def get(self, key: str) -> dict:
        """The entry with this key."""
        self._reader.seek(self._places[key])
        return json.loads(self._reader.readline())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._reader.close()
        self._file.close()


def request_key(*parts) -> str:
    """A fingerprint of what JSON can hold, the same on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
