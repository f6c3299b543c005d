"""Forms of rows of training data, and the faults of rows that cannot be read."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any


# the columns that make a form, in TRL's order where rows hold several; `conversations` is that of {"from", "value"}
TOKENS = ("input_ids",)
PAIR = ("prompt", "completion")
CHAT = ("messages",)
OLD_CHAT = ("conversations",)
TEXT = ("text",)
FORMS = (TOKENS, PAIR, CHAT, OLD_CHAT, TEXT)
# what is read beside them
BESIDE = ("tools", "chat_template_kwargs")
IGNORED = -100
BESIDE_TOKENS = ("labels", "completion_mask", "assistant_masks")


def form_of(columns: Collection[str], forms: Iterable[tuple[str, ...]] = FORMS) -> tuple[str, ...] | None:
    """Returns the columns of the form that rows with these columns have, or None if the form is unknown."""
    return next((form for form in forms if set(form) <= set(columns)), None)


def form_of_row(row: Mapping[str, Any], forms: Iterable[tuple[str, ...]] = FORMS) -> tuple[str, ...] | None:
    """Returns a row's form by its columns that hold a value, or else by all of its columns, or None."""
    return form_of([column for column, value in row.items() if value is not None], forms) or form_of(row, forms)


def names(form: Iterable[str]) -> str:
    """Joins column names for a sentence."""
    return " and ".join(f"`{column}`" for column in form)


def problem(row: Mapping[str, Any], form: tuple[str, ...], vocab_size: int | None = None) -> str | None:
    """Returns a row's fault, as the end of a sentence that begins with the row's number; None if it has none.

    Args:
        row: Column to value.
        form: The columns that make its form.
        vocab_size: Token ids are below it.
    """
    missing = [column for column in form if row.get(column) is None]
    if missing:
        given = [column for column, value in row.items() if value is not None]
        other = form_of([column for column in given if column not in form])
        instead = f" but {names(other)}" if other else f" (it has {given})"
        return f"has no {names(missing)}{instead}, where the form of its domain is {names(form)}"
    if form == TOKENS:
        return _problem_of_tokens(row, vocab_size)
    kinds = {column: type(row[column]).__name__ for column in form}
    if len(set(kinds.values())) > 1:
        return f"has {' and '.join(f'`{c}` as {kind}' for c, kind in kinds.items())}, where both are text or both are turns"
    if not isinstance(row.get("chat_template_kwargs", {}), Mapping):
        return f"has {row['chat_template_kwargs']!r:.60} in `chat_template_kwargs`, which must be an object"
    for column in form:
        value = row[column]
        if isinstance(value, str) and column not in ("messages", "conversations"):
            fault = _problem_of_text(value)
        elif column in ("prompt", "completion", "messages", "conversations"):
            fault = _problem_of_turns(value, ("from", "value") if column == "conversations" else ("role", "content"))
        else:
            fault = f"{value!r:.60}, which is no text"
        if fault:
            return f"has in `{column}` {fault}"
    return None


def _problem_of_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair, {text[error.start : error.start + 1]!a}, which is no character"
    return None


def _problem_of_turns(turns: Any, keys: tuple[str, str]) -> str | None:
    role, content = keys
    if not isinstance(turns, list) or not turns:
        return f"{turns!r:.60}, where a list of turns like {{{role!r}: ..., {content!r}: ...}} must be"
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str) or not turn[role]:
            return f"turn {number}, {turn!r:.60}, which has no `{role}`"
        # tool calls and thoughts may stand alone
        contents = [value for key, value in turn.items() if key not in (role, "name") and value is not None]
        if not contents:
            return f"turn {number}, {turn!r:.60}, which has no `{content}`"
        fault = next((f for value in contents if isinstance(value, str) and (f := _problem_of_text(value))), None)
        if fault:
            return f"turn {number} with {fault}"
    return None


def _problem_of_tokens(row: Mapping[str, Any], vocab_size: int | None) -> str | None:
    ids = row["input_ids"]
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        return f"has in `input_ids` {ids!r:.60}, where a list of token ids must be"
    if vocab_size is not None and max(ids) >= vocab_size:
        return f"has in `input_ids` the id {max(ids)}, but the vocabulary has {vocab_size} rows"
    for column in BESIDE_TOKENS:
        values = row.get(column, ids)
        if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
            return f"has in `{column}` {values!r:.60}, where a list of numbers must be"
        if len(values) != len(ids):
            return (
                f"has {len(values)} numbers in `{column}` and {len(ids)} in `input_ids`, where both are of one length"
            )
    for label in row.get("labels", ()):
        if label != IGNORED and (label < 0 or (vocab_size is not None and label >= vocab_size)):
            return (
                f"has in `labels` {label}, which is neither a token id of the vocabulary nor {IGNORED}, for no label"
            )
    return None
