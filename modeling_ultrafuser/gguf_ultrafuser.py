"""Specialists in one GGUF file, as llama.cpp reads them: their weights are dequantised while they are read."""

import importlib
import math
import os
import struct

from transformers import GgufConfig
from transformers.utils import is_gguf_available

from .files_ultrafuser import UnreadableFileError, check_file
from .refusals_ultrafuser import MissingPackageError, Refusal, UnavailableError


# a vocabulary of a quarter of a million tokens, its merges, scores and kinds are a million values
MOST_VALUES = 1 << 22
MOST_ALIGNMENT = 1 << 16
_VERSIONS = (2, 3)
# how a value is written, by its kind
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def gguf_arguments(source) -> tuple[str, dict]:
    """Returns what `from_pretrained` takes for a GGUF file: its folder, and `gguf_file`."""
    folder, file = os.path.split(os.fspath(source))
    return folder or ".", {"gguf_file": file}


def is_gguf(source) -> bool:
    """Returns whether a specialist is given as a GGUF file."""
    return isinstance(source, str | os.PathLike) and os.fspath(source).lower().endswith(".gguf")


def check_gguf(name: str, source: str) -> dict[str, tuple[int, ...]]:
    """Refuses a GGUF file that is not there, is not whole, or cannot be read here.

    Returns:
        Shape of each of its tensors.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is none, or damaged.
        ImportError: If the package that reads it is missing.
    """
    if not os.path.exists(source):
        raise UnavailableError(
            f"{source!r} of {name!r} is not there",
            "A GGUF specialist is a file on this machine",
            "Check the spelling; fetch one from the Hub first: `hf download OWNER/NAME FILE.gguf --local-dir FOLDER`.",
            about="file",
        )
    check_file(source)
    with open(source, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise Refusal(
            f"{source!r} of {name!r} begins with {magic!r}",
            "A GGUF file begins with the letters GGUF",
            "It is of another format, or a broken download: fetch it again.",
            about="file",
        )
    if not is_gguf_available():
        raise MissingPackageError(
            f"the package `gguf` is not installed, which reads GGUF files such as {source!r} of {name!r}",
            "",
            'Install it: `pip install "ultrafuser[gguf]"`.',
            about="file",
        )
    return _read_header(source)


def _read_header(path: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a GGUF file, once it is known that all that it announces is in it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size

        def take(count: int) -> bytes:
            left = size - file.tell()
            if count > left:
                raise _damaged(path, f"at byte {file.tell():,} it announces {count:,} more, and {left:,} are left")
            return file.read(count)

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", take(struct.calcsize(f"<{kind}")))[0]

        def text() -> str:
            return take(number("Q")).decode("utf-8", "backslashreplace")

        def pass_over(kind: int, count: int) -> None:
            if count > MOST_VALUES:
                raise _damaged(path, f"it announces a list of {count:,} values, and {MOST_VALUES:,} are read at most")
            if kind in _NUMBERS:
                take(struct.calcsize(_NUMBERS[kind]) * count)
            elif kind == _TEXT:
                for _ in range(count):
                    take(number("Q"))
            else:
                raise _damaged(path, f"it has a value of kind {kind}, which there is not")

        take(4)
        if (version := number("I")) not in _VERSIONS:
            raise _damaged(path, f"it is of version {version}, and versions 2 and 3 are read")
        tensors, fields, alignment, keys = number("Q"), number("Q"), 32, set()
        for _ in range(fields):
            key, kind = text(), number("I")
            if key in keys:
                raise _damaged(path, f"it says {key[:200]!r} twice")
            keys.add(key)
            if key == "general.alignment" and kind == 4:
                alignment = number("I")
            elif key.endswith(".block_count") and kind in _NUMBERS:
                # lists of as many are made of it
                if not 0 <= (layers := number(_NUMBERS[kind])) <= tensors:
                    raise _damaged(path, f"it announces {layers:,} layers, and {tensors:,} tensors in all")
            elif kind == _LIST:
                pass_over(number("I"), number("Q"))
            else:
                pass_over(kind, 1)
        if not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise _damaged(path, f"its tensors start at multiples of {alignment:,}, which is no power of two")
        shapes, sizes, end = {}, importlib.import_module("gguf").GGML_QUANT_SIZES, 0
        for _ in range(tensors):
            name, axes = text(), number("I")
            shape = tuple(number("Q") for _ in range(min(axes, 5)))
            kind, start = number("I"), number("Q")
            if name in shapes:
                raise _damaged(path, f"it has two tensors `{name[:200]}`")
            if axes > 4 or math.prod(shape) >= 1 << 50 or kind not in sizes or math.prod(shape) % sizes[kind][0]:
                raise _damaged(path, f"`{name[:200]}` is of kind {kind} and shape {shape}, which there is not")
            if start != end:
                raise _damaged(path, f"`{name[:200]}` starts at byte {start:,}, where {end:,} is expected")
            # as PyTorch has it: ggml begins with the axis that is last
            shapes[name] = shape[::-1]
            block, width = sizes[kind]
            last = start + math.prod(shape) // block * width
            end = _rounded(last, alignment)
        begin = _rounded(file.tell(), alignment)
        if shapes and begin + last > size:
            raise _damaged(
                path, f"its tensors end at byte {begin + last:,}, and it has {size:,} bytes: a broken download"
            )
    return shapes


def _rounded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _damaged(path: str, why: str) -> UnreadableFileError:
    return UnreadableFileError(f"{path!r} is not whole: {why}", "A GGUF file is read only if it is")


def dequantised() -> dict:
    """Returns the argument of `from_pretrained` that makes plain weights of a GGUF file."""
    return {"quantization_config": GgufConfig(dequantize=True)}
