"""A journal of finished answers and judgements, and the answers of a served model to questions of one or more turns."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..journal import LineFile, lines
from .endpoint import BadReplyError, Endpoint, RefusedError, for_all
from .questions import Question


class AnswerJournal(LineFile):
    """Rows by `id` and `part`. The first line holds the settings that the work was done with.

    Attributes:
        rows: Finished rows by `id` and `part`, which is a turn or an order.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        """Opens the journal, or begins one.

        Raises:
            ValueError: If it was begun with other settings, naming those that differ, or is no journal.
        """
        self.rows: dict[tuple[str, int], dict] = {}
        self._settings: dict | None = None
        super().__init__(path)
        if self._settings is None:
            self.write(settings)
        else:
            _check_settings(path, self._settings, settings)

    def _take(self, entry: dict, place: int) -> None:
        if self._settings is None:
            self._settings = entry
        else:
            self.rows[_place(self.path, entry)] = entry

    def add(self, id: str, part: int, **result) -> None:
        """Writes down a finished piece of work."""
        self.write({"id": id, "part": part, **result})


def read_journal(path: Path) -> tuple[dict, dict]:
    """The settings of a journal, and its rows by `id` and `part`.

    Raises:
        ValueError: If the file is no journal.
    """
    settings, *rows = [entry for _, _, entry in lines(path)] or [None]
    if settings is None:
        raise ValueError(f"{str(path)!r} is no journal of answers or judgements: it has no whole line.")
    return settings, {_place(path, row): row for row in rows}


def _place(path: Path, row: dict) -> tuple[str, int]:
    if not isinstance(row.get("id"), str) or not isinstance(row.get("part"), int):
        raise ValueError(
            f"{str(path)!r} is no journal of answers or judgements: a row has the fields {sorted(row)}, and not `id` and "
            f"`part`."
        )
    return row["id"], row["part"]


def _check_settings(path: Path, found: dict, wanted: dict) -> None:
    if differ := [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]:
        changes = "; ".join(f"{key}: {found.get(key)!r} then, {wanted.get(key)!r} now" for key in differ)
        raise ValueError(
            f"One journal holds work done with one set of settings, or its numbers would mean nothing, but "
            f"{str(path)!r} was begun with others ({changes}). Choose another folder, or delete that file."
        )


def messages_of(question: Question, turn: int, journal: AnswerJournal) -> list[dict]:
    """The conversation up to a turn, which comes last."""
    messages = []
    for t in range(turn):
        messages.append({"role": "user", "content": question.turns[t]})
        messages.append({"role": "assistant", "content": journal.rows[question.id, t]["answer"]})
    return [*messages, {"role": "user", "content": question.turns[turn]}]


async def answer_through(
    endpoint: Endpoint,
    questions: list[Question],
    journal: AnswerJournal,
    *,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Asks a server for what the journal lacks; the turns of a question one after the other.

    Args:
        endpoint: The model to be judged.
        questions: To answer.
        journal: Gets `answer` and the server's `finish`. A question that only ever gets what is no reply, while others
            are answered, has an empty answer, and says why as its `finish`.
        advance: Called after each answer.

    Raises:
        EndpointError: As for `Endpoint.connect`. What was finished is in the journal.
    """
    failures: list[Exception] = []
    async with endpoint.connect() as ask:

        async def work(question: Question, *, give_up: bool) -> None:
            for turn in range(len(question.turns)):
                if (question.id, turn) not in journal.rows:
                    try:
                        answer, finish = await ask(messages_of(question, turn, journal))
                    except (BadReplyError, RefusedError) as error:
                        if not give_up:
                            failures.append(error)
                            return
                        answer, finish = "", f"given up: {error}"
                    journal.add(question.id, turn, answer=answer.strip(), finish=finish)
                    advance()

        await for_all(questions, partial(work, give_up=False), endpoint.concurrency)
        if failures and not journal.rows:
            # it is not the questions
            raise failures[0]
        # the others are answered: what fails once more is given up
        await for_all(questions, partial(work, give_up=True), endpoint.concurrency)
