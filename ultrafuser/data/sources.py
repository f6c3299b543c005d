"""Public sets, files and Hub sets, row by row, in the one schema of this package.

A record is `{"messages": [{"role", "content"}, ...], "domain", "topic", "source", "licence"}`, with more keys if a row
has them: what trainers read is `messages` and `domain`.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import yaml
from tqdm.auto import tqdm

from ..atomic import whole_file


KEYS = ("messages", "domain", "topic", "source", "licence")
MORE = ("subtopic", "kind", "skills")
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class Source(NamedTuple):
    """Location of a data set, its licence, and which of its columns holds what (see `to_record`)."""

    path: str
    domain: str | None
    licence: str | None
    columns: dict[str, str]
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    files: str | None = None
    per_subset: int | None = None


SOURCES = {
    name: Source(**about)
    for name, about in yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text()).items()
}


class MalformedRow(ValueError):  # noqa: N818
    """A row that cannot become a record: what is wrong with it, and where it stands."""


def take_in(
    name: str,
    *,
    domain: str | None = None,
    licence: str | None = None,
    columns: dict[str, str] | None = None,
    files: str | list[str] | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    per_subset: int | None = None,
    on_malformed: Callable[[str], Any] | None = None,
) -> Iterator[dict]:
    """Streams a set as records: nothing is held but the row at hand.

    Args:
        name: One of `SOURCES`, a file, a folder that `save_to_disk` wrote or of the Hub's layout, or a set on the Hub.
        domain: Domain of all records. Default: the source's, or what the row says.
        licence: Licence of all records. Default: the source's, what the row says, or what the set's card says.
        columns: Which column holds what, see `to_record`. Default: the source's, or the schema's own names.
        files: Files of the set's layout to read instead of the Hub's, for example a copy on this machine.
        config: The set's configuration, where it has several.
        split: The part of the set. Default: the source's, or "train".
        revision: Branch, tag or commit on the Hub.
        per_subset: Take so many first rows of each of the set's configurations, one after the other.
        on_malformed: Is told about every malformed row, which is then left out. Default: the first one is an error.

    Raises:
        MalformedRow: If a row lacks something, naming the row and what is missing.
    """
    source = SOURCES.get(name) or Source(name, None, None, columns or {key: key for key in (*KEYS, *MORE)})
    given = {"columns": columns, "files": files, "config": config, "split": split, "revision": revision}
    given["per_subset"] = per_subset
    if per_subset is not None and (per_subset < 1 or files or config):
        raise ValueError(
            f"Rows per subset are a number of at least 1 from each configuration of a set, but got {per_subset} with "
            f"files={files} and config={config!r}. Leave out files and config, or the number."
        )
    source = source._replace(**{key: value for key, value in given.items() if value})
    domain, licence = domain or source.domain, licence or source.licence
    if unknown := set(source.columns) - set(TAKEN):
        raise ValueError(f"A mapping gives columns for any of {list(TAKEN)}, but got {sorted(unknown)}.")
    return _records(name, source, domain, licence, bool(files), on_malformed)


def _records(name, source: Source, domain, licence, local: bool, on_malformed) -> Iterator[dict]:
    if not licence and not local and not Path(source.path).is_file():
        licence = _licence_of_card(source.path)
    warned = False
    for place, row in _rows(source, local):
        try:
            record = to_record(row, source.columns, domain=domain, licence=licence, source=name)
        except MalformedRow as error:
            message = f"{place}: {error}"
            if on_malformed is None:
                raise MalformedRow(
                    f"{message} Repair it, or leave such rows out: --skip-malformed, `skip_malformed` in Python."
                ) from None
            on_malformed(message)
            continue
        if record["licence"] == "unknown" and not warned:
            warned = True
            warnings.warn(
                f"The licence of {name!r} is unknown, and recorded as unknown. Find out before you share what is trained on "
                f"it, and take it in with it: `take-in --licence`, `licence` in Python.",
                stacklevel=3,
            )
        yield record


def _rows(source: Source, local: bool) -> Iterator[tuple[str, Any]]:
    """Every row and where it stands."""
    # plain lines are read plainly: an error then has the number of its line
    paths = [source.files] if isinstance(source.files, str) else source.files
    paths = paths if local else [source.path]
    if paths and all(path.endswith(".jsonl") and Path(path).is_file() for path in paths):
        for path in paths:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{path}, line {number}", line
        return
    # heavy, and not needed for plain lines
    from datasets import load_dataset, load_from_disk

    if local or Path(source.path).is_file():
        suffix = Path(paths[0]).suffix
        if suffix not in BUILDERS:
            raise ValueError(f"Files are told by their ending, one of {sorted(BUILDERS)}, but got {paths[0]!r}.")
        rows = load_dataset(BUILDERS[suffix], data_files=paths, split="train", streaming=True)
    elif saved := [f for f in (Path(source.path), Path(source.path) / "dataset") if (f / "state.json").is_file()]:
        # the second is of a folder that `ultrafuser data make` wrote
        rows = load_from_disk(saved[0])
    else:
        rows = _set_rows(source)
    for number, row in enumerate(rows, start=1):
        yield f"{', '.join(paths) if local else source.path}, row {number}", row


def _set_rows(source: Source) -> Iterable:
    """Streams a set, or so many rows of each of its configurations."""
    from datasets import get_dataset_config_names, load_dataset

    of = {"split": source.split, "revision": source.revision, "streaming": True}
    if source.per_subset is None:
        return load_dataset(source.path, source.config, data_files=source.files, **of)
    configs = get_dataset_config_names(source.path, revision=source.revision)
    parts = (load_dataset(source.path, config, **of).take(source.per_subset) for config in configs)
    return (row for part in tqdm(parts, total=len(configs), unit=" subsets", disable=None) for row in part)


def raw_rows(path: str, *, config: str | None = None, split: str = "train") -> Iterator[Any]:
    """Rows of a file, a folder or a Hub set as they are, streamed."""
    for _, row in _rows(Source(path, None, None, {}, config=config, split=split), local=False):
        yield json.loads(row) if isinstance(row, str) else row


# what a mapping may name a column for
TAKEN = (*KEYS, *MORE, "system", "prompt", "input", "answer")


def to_record(
    row: Any, columns: dict[str, str], *, domain: str | None = None, licence: str | None = None, source: str = ""
) -> dict:
    """One row as a record.

    Args:
        row: The row, or a line of JSON.
        columns: Which column holds what: either `messages`, or `prompt` and `answer`, with `system`, and `input` that
            is put under the prompt. Messages are `role` and `content`, or `from` and `value` as in ShareGPT. `domain`,
            `topic`, `licence`, `subtopic`, `kind` and `skills` are taken if they are there.
        domain: Domain, if the row does not say.
        licence: Licence, if the row does not say.
        source: Name of the set, if the row does not say.

    Raises:
        MalformedRow: If something is missing, or is not of its type.
    """
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise MalformedRow(f"This is no JSON ({error}): {row[:80]!r}.") from None
    if not isinstance(row, dict):
        raise MalformedRow(f"A row is an object with named columns, but this is a {type(row).__name__}.")
    found = {key: row.get(columns[key]) for key in (*KEYS[1:], *MORE) if key in columns}
    record = {
        "messages": _messages(_value(row, columns["messages"], list))
        if "messages" in columns
        else _turn(row, columns),
        "domain": domain or found.get("domain"),
        "topic": found.get("topic") or "",
        "source": found.get("source") or source,
        "licence": licence or found.get("licence") or "unknown",
        **{key: found[key] for key in MORE if found.get(key)},
    }
    if not record["domain"]:
        raise MalformedRow(f"Every record belongs to a domain, but none is given, and the columns are {list(row)}.")
    return record


def _turn(row: dict, columns: dict[str, str]) -> list[dict]:
    for key in ("prompt", "answer"):
        if key not in columns:
            raise MalformedRow(f"A mapping names `messages`, or `prompt` and `answer`, but this one only {columns}.")
    prompt, answer = (_value(row, columns[key], str) for key in ("prompt", "answer"))
    if "input" in columns and (row.get(columns["input"]) or "").strip() not in ("", "<noinput>"):
        prompt = f"{prompt}\n\n{row[columns['input']]}"
    for key, text in (("prompt", prompt), ("answer", answer)):
        if not text.strip():
            raise MalformedRow(f"Column {columns[key]!r} is empty.")
    system = row.get(columns["system"]) if "system" in columns else None
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _value(row: dict, column: str, kind: type) -> Any:
    if column not in row:
        raise MalformedRow(f"Column {column!r} is missing; there are {list(row)}.")
    if row[column] is None or row[column] == "":
        raise MalformedRow(f"Column {column!r} is empty.")
    if not isinstance(row[column], kind):
        raise MalformedRow(
            f"Column {column!r} holds a {kind.__name__}, but here a {type(row[column]).__name__}: {row[column]!r:.80}."
        )
    return row[column]


def _messages(found: list) -> list[dict]:
    messages = []
    for i, message in enumerate(found):
        if not isinstance(message, dict):
            raise MalformedRow(f"Message {i} is an object, but here a {type(message).__name__}.")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            raise MalformedRow(f"Message {i} is from one of {sorted(ROLES)}, but here from {role!r}.")
        if not isinstance(content, str):
            raise MalformedRow(f"Message {i} has no text, but {content!r:.80}.")
        messages.append({"role": ROLES[role], "content": content})
    # a conversation that was cut begins with an answer, or ends with a question: nothing can be learnt from these
    begin = 1 if messages and messages[0]["role"] == "system" else 0
    while len(messages) > begin and messages[begin]["role"] == "assistant":
        del messages[begin]
    while messages and messages[-1]["role"] != "assistant":
        del messages[-1]
    if not messages:
        raise MalformedRow("There is no question with an answer behind it.")
    for i, (one, two) in enumerate(zip(messages[begin:], messages[begin + 1 :], strict=False), start=begin + 1):
        if one["role"] == two["role"] or two["role"] == "system":
            raise MalformedRow(f"User and assistant take turns, but message {i} is the {two['role']}'s.")
    return messages


def _licence_of_card(path: str) -> str | None:
    from huggingface_hub import DatasetCard

    try:
        card = DatasetCard.load(Path(path) / "README.md" if Path(path).is_dir() else path)
    # whatever stands in the way, the licence is then unknown, which is said
    except Exception:
        return None
    found = card.data.get("license")
    return " or ".join(found) if isinstance(found, list) else found


def lines_file(path: Path, mode: str = "w") -> TextIO:
    """A file to write lines of JSON to. Half a surrogate pair, which is no text but does come, is written as JSON can."""
    return open(path, mode, encoding="utf-8", errors="backslashreplace")


def line_of(record: dict) -> str:
    """A record as a line of such a file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> Iterator[dict]:
    """Records of a file that this package wrote."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_records(records: Iterable[dict], path: Path) -> int:
    """Writes one JSON line per record, and tells how many; the file is there once it is whole."""
    number = 0
    with whole_file(path) as file:
        for record in tqdm(records, unit=" records", disable=None):
            file.write(line_of(record))
            number += 1
    return number
