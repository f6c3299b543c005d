"""Files that others wrote, read with limits: what is wrong with one is said in a sentence that names it."""

import json
import math
import os
import re
import stat
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


# what is read whole, in bytes; configurations are some kilobytes, indices and vocabularies some megabytes
MOST_BYTES = {
    **dict.fromkeys(("tokenizer.json", "trainer_state.json"), 1 << 28),
    **dict.fromkeys(("vocab.json", SAFE_WEIGHTS_INDEX_NAME), 1 << 26),
}
MOST_BYTES_OF_OTHERS = 1 << 23
MOST_BYTES_OF_A_HEADER = 1 << 26
MOST_NESTED = 64
MOST_LAYERS = 10_000
MOST_BETWEEN = 100_000  # numbers of a vocabulary without tokens, and as many more as there are tokens
# how much longer a tokenizer may make a text, and how much longer its maps of characters (SentencePiece's) may at most
MOST_GROWTH, MOST_GROWTH_OF_MAPS = 100, 10
JSON_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "specialists.json", SAFE_WEIGHTS_INDEX_NAME),
)
TEXT_FILES = ("chat_template.jinja", "merges.txt", "README.md")

# arguments of `from_pretrained` that say where to read
HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
FLOATS = {"F64", "F32", "F16", "BF16"}

_HEADS = re.compile(r"(num|n)_(\w+_)?heads?")
_LAYERS = re.compile(r"num_(\w+_)?layers|n_layers?|(en|de)coder_layers")
_WINDOWS = re.compile(r"sliding_window|attention_chunk_size|kv_lora_rank")
_SCALES = re.compile(r"\w*soft_?cap(ping)?|logits_scaling|logit_scale|\w+_multiplier|logits_mup_width_multiplier")
# a folder of such files is loaded in place of its model.safetensors
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


class UnreadableFileError(ValueError):
    """A file of somebody's that cannot be read, or that says what cannot be."""


def is_number(value) -> bool:
    """Whether a value of a file is a number that a `float` can hold, which JSON's long integers need not be."""
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
            f"{what} ({os.fspath(source)!r}) cannot be read: {said.removesuffix('.')}. {reason}"
        ) from error


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    # with remote code the package's name is another one
    return module.endswith("_ultrafuser") or module.split(".")[0] in ("trainers", "ultrafuser")


def check_file(path: str | os.PathLike, most: int | None = None) -> None:
    """Refuses what is no ordinary file, or is larger than it can be.

    Raises:
        UnreadableFileError: Naming it.
        OSError: If it is not there.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise UnreadableFileError(
            f"Only ordinary files are read, because a pipe or a device need not end, but {os.fspath(path)!r} is "
            f"something else. Put a file in its place."
        )
    if most is not None and about.st_size > most:
        raise UnreadableFileError(
            f"A file of this kind has at most {most:,} bytes, but {os.fspath(path)!r} has {about.st_size:,}. It is another "
            f"file, or damaged: fetch it again."
        )


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        UnreadableFileError: If it holds anything else, or is too large, or too deeply nested.
        OSError: If it is not there.
    """
    check_file(path, MOST_BYTES.get(os.path.basename(path), MOST_BYTES_OF_OTHERS))
    with open(path, "rb") as file:
        return _parsed(file.read(), path)


def _parsed(text: bytes, path: str | os.PathLike) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UnreadableFileError(
            f"{os.fspath(path)!r} must hold JSON, but does not: {reason}. It is damaged: fetch it again."
        ) from error
    if not isinstance(found, dict):
        raise UnreadableFileError(
            f"{os.fspath(path)!r} must hold an object in JSON, but holds a {type(found).__name__}. Fetch it again."
        )
    _check_nesting(found, path)
    return found


def _check_nesting(value, path: str | os.PathLike) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_NESTED:
            raise UnreadableFileError(
                f"JSON is read to {MOST_NESTED} levels, but {os.fspath(path)!r} is nested more deeply. Fetch it again."
            )
        values = (v for found in level for v in (found.values() if isinstance(found, dict) else found))
        level = [v for v in values if isinstance(v, dict | list)]


def check_folder(folder: str | os.PathLike) -> None:
    """Refuses a model's folder in which something can't be read, or would be read in place of the model.

    Raises:
        UnreadableFileError: Naming the file.
        OSError: If the folder cannot be read.
    """
    files = sorted(os.listdir(folder))
    for name in files:
        path = os.path.join(folder, name)
        if os.path.exists(path) and not os.path.isdir(path):
            check_file(path, MOST_BYTES_OF_OTHERS if name in TEXT_FILES else None)
        if name in JSON_FILES:
            found = read_json(path)
        if name in ("config.json", "generation_config.json"):
            _check_kinds(found, path)
        if name == "tokenizer.json":
            _check_growth(found, path)
            _check_numbers(found, path)
    if "config.json" not in files:
        return
    check_config(os.path.join(folder, "config.json"))
    whole = SAFE_WEIGHTS_NAME in files or SAFE_WEIGHTS_INDEX_NAME in files
    instead = [n for n in files if n == "adapter_config.json" or (whole and _DISTRIBUTED.fullmatch(n))]
    if instead:
        raise UnreadableFileError(
            f"A model's folder holds one plain model, but {os.fspath(folder)!r} holds {instead[0]!r}, too, which "
            f"transformers would put into it or load in its place. Move that away; or merge an adapter first, "
            f"`merge_and_unload()`."
        )


def _check_growth(found: dict, path: str | os.PathLike) -> None:
    """Refuses a tokenizer whose replacements, one after another, make a text too long for the memory."""
    for part in ("normalizer", "decoder"):
        factor, level = 1.0, [found.get(part)]
        while level:
            for step in (s for s in level if isinstance(s, dict) and s.get("type") in ("Replace", "Precompiled")):
                pattern, content = step.get("pattern"), step.get("content")
                replaced = pattern.get("String") if isinstance(pattern, dict) else pattern
                size = len(replaced) if isinstance(replaced, str) else 1
                factor *= max(len(content) / max(size, 1), 1) if isinstance(content, str) else MOST_GROWTH_OF_MAPS
            nested = (
                v for s in level if isinstance(s, dict | list) for v in (s.values() if isinstance(s, dict) else s)
            )
            level = [v for v in nested if isinstance(v, dict | list)]
        if factor > MOST_GROWTH:
            raise UnreadableFileError(
                f"A tokenizer's replacements make a text at most {MOST_GROWTH} times as long, because more would fill the "
                f"memory, but those of the {part} in {os.fspath(path)!r} make one {factor:.3g} times as long. Fetch it again."
            )


def _check_numbers(found: dict, path: str | os.PathLike) -> None:
    """Refuses a vocabulary whose numbers are far apart: the library walks through all that lie between them."""
    model, added = found.get("model"), found.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # some kinds list their tokens
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    numbers += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    tokens = len(numbers) + (len(vocabulary) if isinstance(vocabulary, list) else 0)
    highest = max((n for n in numbers if isinstance(n, int)), default=0)
    if highest >= 2 * tokens + MOST_BETWEEN:
        raise UnreadableFileError(
            f"Tokens are numbered from 0, almost without gaps, or the gaps would fill the memory, but of {tokens:,} tokens in "
            f"{os.fspath(path)!r} one has the number {str(highest)[:30]}. Fetch it again."
        )


def _check_kinds(found: dict, path: str | os.PathLike) -> None:
    """Refuses settings of generation of the wrong kind, which are read first when a text is generated."""

    def token(value) -> bool:
        return type(value) is int and abs(value) < 1 << 31

    def ids(value) -> bool:
        return all(map(token, value)) if isinstance(value, list) else token(value)

    def words_of_ids(value) -> bool:
        return isinstance(value, list) and all(map(ids, value))

    def words(value) -> bool:
        return all(isinstance(v, str) for v in value) if isinstance(value, list) else isinstance(value, str)

    for key, value in found.items():
        for pattern, fits, what in (
            (
                r"(bos|eos|pad|decoder_start|forced_bos|forced_eos)_token_id",
                ids,
                "a token's number, or a list of such",
            ),
            (r"(begin_)?suppress_tokens|bad_words_ids|force_words_ids", words_of_ids, "a list of tokens' numbers"),
            (r"architectures|stop_strings", words, "a list of words"),
            (
                r"(max|min)_(length|new_tokens)|num_(beams|beam_groups|return_sequences)|top_[hkp]|min_p|typical_p",
                is_number,
                "a number",
            ),
            (
                r"temperature|(repetition|length|diversity|encoder_repetition)_penalty|(epsilon|eta)_cutoff",
                is_number,
                "a number",
            ),
            (r"(encoder_)?no_repeat_ngram_size|guidance_scale|max_time|penalty_alpha", is_number, "a number"),
            (
                r"do_sample|use_cache|output_(attentions|hidden_states|scores|logits)|remove_invalid_values|renormalize_logits",
                lambda v: isinstance(v, bool),
                "true or false",
            ),
        ):
            if re.fullmatch(pattern, key) and value is not None and not fits(value):
                raise UnreadableFileError(
                    f"`{key}` is {what}, but in {os.fspath(path)!r} it is {str(value)[:100]!r}. Correct it."
                )


def check_config(path: str | os.PathLike, tensors: int | None = None) -> dict:
    """Reads a configuration, and refuses numbers of layers that nothing could have.

    Args:
        path: Of config.json.
        tensors: How many there are in the model's files: every layer has one at least.

    Raises:
        UnreadableFileError: Naming the field.
    """
    raw = read_json(path)
    for field in ("transformers_weights", "configuration_files"):
        if field in raw:
            raise UnreadableFileError(
                f"A model is read from config.json and {SAFE_WEIGHTS_NAME}, but `{field}` of {os.fspath(path)!r} names "
                f"other files, {str(raw[field])[:200]!r}. Take the field out, and rename the files."
            )
    most = MOST_LAYERS if tensors is None else tensors
    why = "none has so many" if tensors is None else f"the files hold {tensors} tensors in all"
    level = [raw]
    while level:
        for found in level:
            for key, value in found.items() if isinstance(found, dict) else ():
                if key == "max_position_embeddings" and value is not None and not (type(value) is int and value > 0):
                    raise UnreadableFileError(
                        f"The longest context is a positive number of tokens, but `{key}` of {os.fspath(path)!r} is "
                        f"{str(value)[:40]!r}. Correct it."
                    )
                if value is not None and not _fits(str(key), value):
                    raise UnreadableFileError(
                        f"`{key}` is a number that is read before a model is built, but in {os.fspath(path)!r} it is "
                        f"{str(value)[:100]!r}. Correct it."
                    )
                if not _LAYERS.fullmatch(str(key)) or value is None or isinstance(value, list | dict):
                    continue
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                    raise UnreadableFileError(
                        f"A number of layers is a whole number, and {why}, but `{key}` of {os.fspath(path)!r} is "
                        f"{repr(value)[:40]}. Correct it, or fetch the file again."
                    )
        values = (v for found in level for v in (found.values() if isinstance(found, dict) else found))
        level = [v for v in values if isinstance(v, dict | list)]
    return raw


def _fits(key: str, value) -> bool:
    """Whether a number that this package itself reads, or that no tensor's shape tells, is one."""
    if _HEADS.fullmatch(key) and not isinstance(value, list | dict):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    if _WINDOWS.fullmatch(key):
        return isinstance(value, int) and abs(value) < 1 << 63
    return not _SCALES.fullmatch(key) or is_number(value)


def weight_files(source: str | os.PathLike, **hub) -> list[str] | None:
    """A model's safetensors on this machine, downloaded if need be; None if it has none.

    Raises:
        UnreadableFileError: If the index of several files names one that is none of the folder's.
        OSError: If one is not there.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, **hub}
    if (one := cached_file(source, SAFE_WEIGHTS_NAME, **optional)) is not None:
        return [one]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index is None:
        return None
    return [cached_file(source, name, **hub) for name in sorted(set(read_index(index).values()))]


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """Which tensor is in which file, by the index of several.

    Raises:
        UnreadableFileError: If it says anything else.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UnreadableFileError(
            f"An index says in its `weight_map` which tensor is in which file, but {os.fspath(path)!r} does not. Fetch "
            f"it again."
        )
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0.][^/\\\0]*\.safetensors", name):
            raise UnreadableFileError(
                f"An index names safetensors files of its own folder, but {os.fspath(path)!r} names {str(name)[:200]!r}. "
                f"Put the file there, and its plain name in the index."
            )
    return names


def read_header(path: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
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
        header = _parsed(file.read(length), path)
    header.pop("__metadata__", None)
    found, end = checked_header(header, path)
    if end != size - 8 - length:
        raise _damaged(
            path, f"its tensors take {end:,} bytes, and the file has {size - 8 - length:,}: a broken download"
        )
    return found


def checked_header(header: dict, path: str | os.PathLike) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
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


def read_headers(files: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
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
    return UnreadableFileError(
        f"A safetensors file is read only if it is whole, but {os.fspath(path)!r} is not: {why}. Fetch it again."
    )
