"""Answers of a served model to questions of one or more turns, in a journal."""

from collections.abc import Callable
from functools import partial

from .answer_journal import AnswerJournal
from .endpoint import BadReplyError, Endpoint, RefusedError, for_all
from .questions import Question


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
    waiting = [q for q in questions if any((q.id, t) not in journal.rows for t in range(len(q.turns)))]
    if not waiting:
        return

    async with endpoint.connect() as ask:

        async def work(question: Question, bad: Callable[[Exception], tuple[str, str]]) -> None:
            for turn in range(len(question.turns)):
                if (question.id, turn) not in journal.rows:
                    try:
                        answer, finish = await ask(messages_of(question, turn, journal))
                    except (BadReplyError, RefusedError) as error:
                        if (said := bad(error)) is None:
                            return
                        answer, finish = said
                    journal.add(question.id, turn, answer=answer.strip(), finish=finish)
                    advance()

        failures: list[Exception] = []
        await for_all(waiting, partial(work, bad=failures.append), endpoint.concurrency)
        if failures and not journal.rows:
            # it is not the questions
            raise failures[0]
        # the others are answered: what fails once more is given up
        waiting = [q for q in waiting if any((q.id, t) not in journal.rows for t in range(len(q.turns)))]
        await for_all(waiting, partial(work, bad=lambda error: ("", f"given up: {error}")), endpoint.concurrency)
