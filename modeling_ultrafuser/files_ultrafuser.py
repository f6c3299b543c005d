"""Files that others wrote, read with limits: an error names the file and what is wrong with it."""

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .refusals_ultrafuser import Refusal


# what is read whole, in bytes; configurations are some kilobytes, indices and vocabularies some megabytes
MOST_BYTES = {
    **dict.fromkeys(("tokenizer.json", "trainer_state.json"), 1 << 28),
    **dict.fromkeys(("vocab.json", SAFE_WEIGHTS_INDEX_NAME), 1 << 26),
}
MOST_BYTES_OF_OTHERS = 1 << 23
MOST_NESTED = 64
# arguments of `from_pretrained` that say where to read
HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class UnreadableFileError(Refusal):
    """A file of somebody's that cannot be read, or that says what cannot be."""

    def __init__(self, fact: str, rule: str = "", way_out: str = "Fetch it again."):
        super().__init__(fact, rule, way_out, about="file")


def is_number(value) -> bool:
    """Returns whether a file's value is a number that a `float` can hold, which JSON's long integers need not be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@contextmanager
def in_words(what: str, source, options: Iterable[str] = ()) -> Iterator[None]:
    """Turns whatever a library raises while it reads a file into a sentence that names the file.

    What already is a sentence stays: errors of the operating system and of the Hub, and what this package raises. A
    mistake in this package stays, too.

    Args:
        what: The first words of the sentence.
        source: The folder or file.
        options: Names of the caller's own options, which may be what is wrong.

    Raises:
        UnreadableFileError: In place of whatever else is raised inside.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except BaseException as error:
        # a panic in Rust is no Exception
        if _is_ours(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {' '.join(lines)[:300]}".removesuffix(": ")
        reason = "A file is damaged, or says what cannot be: fetch it again."
        if names := sorted(options):
            reason = f"One of the options {names} is not what can be; or else a file is damaged: fetch it again."
        raise UnreadableFileError(
            f"{what} ({os.fspath(source)!r}) cannot be read: {said.removesuffix('.')}", "", reason
        ) from error


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    # with remote code the package's name is another one
    return module.endswith("_ultrafuser") or module.split(".")[0] in ("trainers", "ultrafuser")


def file_or_none(source: str | os.PathLike, name: str, **hub) -> str | None:
    """Returns the path of a file of a folder or a repository, downloaded if need be; None if it cannot be had."""
    try:
        return cached_file(source, name, **hub)
    except OSError:
        return None


def check_file(path: str | os.PathLike, most: int | None = None) -> None:
    """Refuses what is no ordinary file, or is larger than it can be.

    Raises:
        UnreadableFileError: Naming it.
        OSError: If it is not there.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise UnreadableFileError(
            f"{os.fspath(path)!r} is no ordinary file",
            "Only ordinary files are read, because a pipe or a device need not end",
            "Put a file in its place.",
        )
    if most is not None and about.st_size > most:
        raise UnreadableFileError(
            f"{os.fspath(path)!r} has {about.st_size:,} bytes",
            f"A file of this kind has at most {most:,} bytes",
            "It is another file, or damaged: fetch it again.",
        )


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        UnreadableFileError: If it holds anything else, or is too large, or too deeply nested.
        OSError: If it is not there.
    """
    check_file(path, MOST_BYTES.get(os.path.basename(path), MOST_BYTES_OF_OTHERS))
    with open(path, "rb") as file:
        return parse_json(file.read(), path)


def parse_json(text: bytes, path: str | os.PathLike) -> dict:
    """Parses JSON that must hold an object; `path` is where it was read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        fact = f"{os.fspath(path)!r} does not hold JSON: {reason}"
        raise UnreadableFileError(fact, way_out="It is damaged: fetch it again.") from error
    if not isinstance(found, dict):
        raise UnreadableFileError(f"{os.fspath(path)!r} holds a {type(found).__name__} instead of an object in JSON")
    if any(depth > MOST_NESTED for depth, _ in enumerate(levels(found), start=1)):
        raise UnreadableFileError(f"{os.fspath(path)!r} is nested too deeply", f"JSON is read to {MOST_NESTED} levels")
    return found


def levels(value) -> Iterator[list]:
    """Yields the lists and objects of JSON: the outermost one, those in it, those in these, and so on."""
    level = [value] if isinstance(value, dict | list) else []
    while level:
        yield level
        values = (v for part in level for v in (part.values() if isinstance(part, dict) else part))
        level = [v for v in values if isinstance(v, dict | list)]
