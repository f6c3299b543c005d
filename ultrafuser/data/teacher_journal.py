"""Journal of a teacher's paid replies, so that none is requested again."""

import json
from pathlib import Path

from ..journal import LineFile


class ReplyJournal(LineFile):
    """Replies by the key of their request. Only where each begins is held in memory.

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


def tokens(told) -> int | None:
    """A server's count of tokens; None if it is none."""
    return told if isinstance(told, int) and not isinstance(told, bool) and told >= 0 else None
