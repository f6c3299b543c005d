"""Rows of text and conversations out of files and of the Hub's sets, each error with its domain, its file and its line."""

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value, load_dataset

from trainers import rows
from trainers.domains import check_kind
from trainers.rows import BESIDE, BESIDE_TOKENS, TEXT, TOKENS

from .keys import leaves
from .source_names import is_file


MOST_CHARACTERS = 4096  # of a name
MOST_FILES = 10_000
# in this order where rows hold several
FORMS = (rows.CHAT, rows.PAIR, TEXT, rows.OLD_CHAT, TOKENS)


def load(arguments: dict[str, Any], domain: str | None = None, *, text_field: str = "text") -> Any:
    """The columns that a trainer reads of a domain.

    Args:
        arguments: Of `load_dataset`.
        domain: Its name; without one, rows name theirs in a column `domain`.
        text_field: The column of plain text.

    Returns:
        A dataset; without `domain` one that has the column, or one dataset per domain.

    Raises:
        ValueError: If it cannot be read, naming domain, file and row.
        OSError: If there is no such file or set.
    """
    whose = f"domain {domain!r}" if domain else "the data"
    words = (word for _, word in leaves(arguments) if isinstance(word, str))
    if long := next((word for word in words if len(word) > MOST_CHARACTERS), None):
        # patterns of files among them take ages
        raise ValueError(
            f"The names of files and sets have at most {MOST_CHARACTERS} characters, but the arguments for {whose} hold one "
            f"of {len(long):,}: {long[:60]!r}... Correct it."
        )
    _check_size(arguments.get("path"), whose)
    forms = [(text_field,) if form == TEXT else form for form in FORMS]
    if files := _local(arguments):
        return _load_files(files, domain, whose, forms)
    dataset = load_set({"split": "train", **arguments}, whose)
    check_kind(dataset, whose)
    columns, more = rows.form_of(dataset.column_names, forms), [] if domain else ["domain"]
    if columns is None or not set(more) <= set(dataset.column_names):
        named = "".join(f", and {rows.names([name])}" for name in more)
        raise ValueError(
            f"Rows have `messages`, `prompt` and `completion`, or `{text_field}`{named}, but those of {arguments} have "
            f"{dataset.column_names}. Rename its columns."
        )
    beside = BESIDE_TOKENS if columns == TOKENS else BESIDE
    return dataset.select_columns([*columns, *(c for c in beside if c in dataset.column_names), *more])


def _check_size(path: Any, whose: str) -> None:
    """Refuses a folder that `load_dataset` would look through for ages, such as the root of a disk.

    Raises:
        ValueError: Naming the folder.
    """
    if isinstance(path, str) and os.path.isdir(path):
        files = (file for _, _, names in os.walk(path) for file in names)
        if next(itertools.islice(files, MOST_FILES, None), None) is not None:
            raise ValueError(
                f"A folder of rows holds up to {MOST_FILES:,} files, because all are looked through, but {path!r} for {whose} "
                f"holds more. Name the folder that holds the rows."
            )


def load_set(arguments: dict[str, Any], whose: str) -> Any:
    """`load_dataset`, whose errors say whose rows it was to load.

    Raises:
        ValueError: If it cannot be read.
        OSError: If there is no such set.
    """
    try:
        return load_dataset(**arguments)
    except Exception as error:  # whatever the library makes of arguments that it cannot follow
        cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"The rows of {whose}, {arguments}, cannot be read: {cause[0]} Look at the files, or correct the arguments of "
            f"`load_dataset`."
        ) from error


def _local(arguments: dict[str, Any]) -> list[str]:
    """The JSON files that these arguments name and nothing else; none if it is for `load_dataset` to find out."""
    files = arguments.get("data_files")
    files = [files] if isinstance(files, str | Path) else files
    other = set(arguments) - {"path", "data_files", "split"}
    if arguments.get("path") != "json" or other or not isinstance(files, list):
        return []
    files = [str(file) for file in files]
    plain = all(is_file(file) and "://" not in file and not set("*?[") & set(file) for file in files)
    return files if plain and arguments.get("split", "train") == "train" else []


@dataclass
class _Form:
    """Collects what the rows of a domain share: columns, the type of each, and what is read beside them."""

    columns: tuple[str, ...]
    types: list[type]
    beside: set[str] = field(default_factory=set)


def _load_files(files: list[str], domain: str | None, whose: str, forms: list[tuple[str, ...]]):
    """All rows are read once to see that they can be, and once more into a file that is mapped into memory."""
    found: dict[str, _Form] = {}
    for place, row in itertools.chain.from_iterable(parse(file, whose) for file in files):
        name = domain or row.get("domain")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{place}: this row of {whose} has the domain {name!r}, but where one file holds all domains every row "
                f"names its own in `domain`. Fill it in, or pass a file per domain: --data NAME=FILE."
            )
        if name not in found:
            columns = rows.form_of_row(row, forms) or ()
            found[name] = _Form(columns, [type(row[c]) for c in columns])
        form = found[name]
        fault = fault_of(row, form.columns, forms)
        types = [type(row.get(c)) for c in form.columns]
        if not fault and types != form.types:
            fault = f"has {rows.names(form.columns)} as {types[0].__name__}, and the rows before it as {form.types[0].__name__}"
        if fault:
            raise ValueError(
                f"{place}: this row of domain {name!r} {fault}. Every row is trained on, so correct it or drop it; rows "
                f"of another form can be a domain of their own."
            )
        form.beside |= {c for c in (BESIDE_TOKENS if form.columns == TOKENS else BESIDE) if row.get(c) is not None}
    if not found:
        raise ValueError(f"{', '.join(files)}: no row is in it, but {whose} needs some. Look at how it was made.")
    # whose content may have changed since the last time
    stamps = [(Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    loaded = {}
    for name, form in found.items():
        columns = [*form.columns, *sorted(form.beside)]
        features = {column: _feature(column, form) for column in columns}
        # each in a list of one, because lists are what the library cuts into shards
        arguments = {"files": [files], "stamps": [stamps], "columns": [columns], "domain": [None if domain else name]}
        loaded[name] = Dataset.from_generator(_kept, features=Features(features), gen_kwargs=arguments)
    return loaded[domain] if domain else loaded


def fault_of(row: dict, columns: tuple[str, ...] | None, forms: Sequence[tuple[str, ...]]) -> str | None:
    """Returns what is wrong with a row, as the rest of a sentence; None if nothing is.

    Args:
        row: The row.
        columns: Those of its form, if it has one.
        forms: Those that rows may have.
    """
    if not columns:
        return f"has {list(row)}, where rows have {', or '.join(map(rows.names, forms))}"
    return rows.problem(row, columns)


def _kept(files, stamps, columns, domain) -> Iterator[dict]:
    for file in files[0]:
        for _, row in parse(file, ""):
            if domain[0] is None or row["domain"] == domain[0]:
                read = {c: row.get(c) for c in columns[0]}
                # TRL takes no null here
                if "chat_template_kwargs" in read:
                    read["chat_template_kwargs"] = read["chat_template_kwargs"] or {}
                yield read


def _feature(column: str, form: _Form):
    if column in (*TOKENS, *BESIDE_TOKENS):
        return List(Value("int64"))
    if column in BESIDE:
        return Json()
    # turns as they are: in columns of their own, what one turn lacks would be filled up
    return List(Json()) if form.types[0] is list else Value("string")


def parse(file: str, whose: str) -> Iterator[tuple[str, dict]]:
    """Rows of a JSON Lines file, or of a JSON file that is one list, zipped or not, and where each stands.

    Raises:
        ValueError: Naming the first line that is none, and whose it is.
        OSError: If the file cannot be read.
    """
    place, number = file, 0
    try:
        with open(file, "rb") as plain, gzip.open(plain) if plain.peek(2)[:2] == b"\x1f\x8b" else plain as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{file}, line {number}"
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.lstrip().startswith("["):
                    for n, row in enumerate(_json(text + b"".join(lines).decode("utf-8")), start=1):
                        place = f"{file}, row {n}"
                        yield place, _object(row)
                elif text.strip():
                    yield place, _object(_json(text))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: {whose} is not UTF-8 here ({error.object[error.start : error.start + 1]!r}). Save the "
            f"file as UTF-8."
        ) from error
    except (_RowError, RecursionError) as error:
        raise ValueError(
            f"{place}: this row of {whose} {error}. Every row is one JSON object: correct it or drop it."
        ) from error
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {file!r} for {whose}. Check the spelling.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(
            f"{file}: {whose} cannot be read beyond line {number}: {error}. If the file is cut, fetch it again."
        ) from error


class _RowError(ValueError):
    """Describes the fault of a row, as the rest of a sentence."""


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _RowError(f"is no JSON ({error.msg} at character {error.pos + 1}): {text.strip()[:60]!r}") from error


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise _RowError(f"is no object: {row!r:.60}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RowError(f"has `{next(k for k in keys if keys.count(k) > 1)}` twice")
    return found
