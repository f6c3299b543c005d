"""Headers of safetensors files: type and shape of each tensor, without its numbers."""

import math
import os
import re
import struct

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .compat_ultrafuser import file_if_any
from .files_ultrafuser import UnreadableFileError, check_file, parse_json, read_json


# type and shape of each tensor, by name
Header = dict[str, tuple[str, tuple[int, ...]]]
MOST_BYTES_OF_A_HEADER = 1 << 26
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(source: str | os.PathLike, **hub) -> list[str] | None:
    """A model's safetensors on this machine, downloaded if need be; None if it has none.

    Raises:
        UnreadableFileError: If the index of several files names one that is none of the folder's.
        OSError: If one is not there.
    """
    if (one := file_if_any(source, SAFE_WEIGHTS_NAME, **hub)) is not None:
        return [one]
    index = file_if_any(source, SAFE_WEIGHTS_INDEX_NAME, **hub)
    if index is None:
        return None
    return [cached_file(source, name, **hub) for name in sorted(set(read_index(index).values()))]


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """Maps each tensor to its file, by the index of several.

    Raises:
        UnreadableFileError: If it says anything else.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UnreadableFileError(
            f"{os.fspath(path)!r} has no `weight_map`",
            "An index says in its `weight_map` which tensor is in which file",
        )
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0.][^/\\\0]*\.safetensors", name):
            raise UnreadableFileError(
                f"{os.fspath(path)!r} names {str(name)[:200]!r}",
                "An index names safetensors files of its own folder",
                "Put the file there, and its plain name in the index.",
            )
    return names


def read_header(path: str | os.PathLike) -> Header:
    """Type and shape of each tensor of a safetensors file, once it is known that all of them are in it.

    Raises:
        UnreadableFileError: If the file is cut off, too long, or damaged.
        OSError: If it is not there.
    """
    check_file(path)
    with open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MOST_BYTES_OF_A_HEADER, size - 8):
            raise _damaged(path, f"its header should have {length:,} bytes, and the file has {size:,}")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    found, end = checked_header(header, path)
    if end != size - 8 - length:
        raise _damaged(
            path, f"its tensors take {end:,} bytes, and the file has {size - 8 - length:,}: a broken download"
        )
    return found


def checked_header(header: dict, path: str | os.PathLike) -> tuple[Header, int]:
    """Type and shape of each tensor, and the bytes that all take, from what the header of a safetensors file says.

    Raises:
        UnreadableFileError: If tensors overlap, leave gaps, or are of a size or type that cannot be.
    """
    spans, found = [], {}
    for key, about in header.items():
        about = about if isinstance(about, dict) else {}
        dtype, shape, span = (about.get(field) for field in ("dtype", "shape", "data_offsets"))
        lists = isinstance(shape, list) and isinstance(span, list | tuple) and len(span) == 2
        whole = lists and all(type(n) is int and 0 <= n < 1 << 50 for n in (*shape, *span))
        if not isinstance(dtype, str) or dtype not in BITS or not whole or len(shape) > 8:
            raise _damaged(path, f"of `{key[:200]}` it says {str(about)[:200]}")
        if span[1] - span[0] != (math.prod(shape) * BITS[dtype] + 7) // 8:
            raise _damaged(path, f"`{key[:200]}`, {dtype} of shape {shape}, has {span[1] - span[0]} bytes")
        spans.append(tuple(span))
        found[key] = dtype, tuple(shape)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _damaged(path, f"a tensor starts at byte {start:,}, where the one before it ends at {end:,}")
        end = stop
    return found, end


def read_headers(files: list[str]) -> Header:
    """The same of a model's files.

    Raises:
        UnreadableFileError: If one is damaged, or two hold a tensor of one name.
    """
    found, where = {}, {}
    for path in files:
        header = read_header(path)
        if twice := sorted(found.keys() & header.keys()):
            raise _damaged(path, f"`{twice[0]}` is in {os.path.basename(where[twice[0]])!r}, too")
        found |= header
        where |= dict.fromkeys(header, path)
    return found


def _damaged(path: str | os.PathLike, why: str) -> UnreadableFileError:
    return UnreadableFileError(f"{os.fspath(path)!r} is not whole: {why}", "A safetensors file is read only if it is")
