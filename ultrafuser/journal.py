"""Finished work, on disk before it is used, so that it is never done, or paid for, again."""

import json
import os
from collections.abc import Iterator
from pathlib import Path


class LineFile:
    """JSON objects, one a line, only ever added to. Use it as a context manager.

    A line is on the disk when `write` returns. A last line that a killed process left half written is cut off when the
    file is opened, and one that found no room at once. One process at a time opens it: `atomic.sole_writer`.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or begins one, and takes up every line of it.

        Raises:
            ValueError: If a line before the last is damaged.
        """
        self.path, self._end = path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for place, end, entry in lines(path):
                self._take(entry, place)
                self._end = end
            os.truncate(path, self._end)
        self._file = path.open("ab", buffering=0)

    def _take(self, entry: dict, place: int) -> None:
        """Notes a line that begins at a place of the file."""
        raise NotImplementedError

    def write(self, entry: dict) -> None:
        """Writes down an object."""
        # half a surrogate pair, which is no text but does come, is written as JSON can
        line = json.dumps(entry).encode() + b"\n"
        try:
            if (written := self._file.write(line)) != len(line):
                # the rest does not fit, which is an error that says why
                self._file.write(line[written:])
                raise OSError(f"{str(self.path)!r} could be written in part only. Is the disk full?")
            os.fsync(self._file.fileno())
        except OSError:
            # what comes next must not run into half a line
            os.truncate(self.path, self._end)
            raise
        self._take(entry, self._end)
        self._end += len(line)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


class ReplyJournal(LineFile):
    """A teacher's paid replies by the key of their request. Only where each begins is held in memory.

    Attributes:
        tokens_in: Prompt tokens of all replies.
        tokens_out: Reply tokens of all replies.
    """

    def __init__(self, path: Path) -> None:
        """Opens the journal, or begins one.

        Raises:
            ValueError: If a line before the last is damaged.
        """
        self.tokens_in = self.tokens_out = 0
        self._places: dict[str, int] = {}
        super().__init__(path)

    def _take(self, entry: dict, place: int) -> None:
        try:
            key, tokens_in, tokens_out = entry["key"], entry["tokens_in"], entry["tokens_out"]
        except KeyError as error:
            raise ValueError(
                f"Each line of {str(self.path)!r} is a reply with `key`, `tokens_in` and `tokens_out`, but one has "
                f"{sorted(entry)}. Take that line out; its request will be made again."
            ) from error
        self._places[key] = place
        self.tokens_in += tokens(tokens_in) or 0
        self.tokens_out += tokens(tokens_out) or 0

    def get(self, key: str) -> dict:
        """The entry with this key."""
        with self.path.open("rb") as file:
            file.seek(self._places[key])
            return json.loads(file.readline())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)


def lines(path: Path) -> Iterator[tuple[int, int, dict]]:
    """Every whole line of a file: where it begins, where it ends, and the object that it holds.

    Raises:
        ValueError: If a line is damaged.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError(f"it holds a {type(entry).__name__}")
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"Each line of a journal is finished work, but line {number} of {str(path)!r} is damaged: "
                    f"{line[:80]!r}. Take that line out; what it held will be done again."
                ) from error
            yield end, end + len(line), entry
            end += len(line)


def tokens(told) -> int | None:
    """A server's count of tokens; None if it is none."""
    return told if isinstance(told, int) and not isinstance(told, bool) and told >= 0 else None
