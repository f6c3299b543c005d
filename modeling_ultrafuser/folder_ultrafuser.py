"""Checks of the small files in a model's folder, before transformers reads them."""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .files_ultrafuser import MOST_BYTES_OF_OTHERS, UnreadableFileError, check_file, is_number, levels, read_json


MOST_LAYERS = 10_000
MOST_BETWEEN = 100_000  # numbers of a vocabulary without tokens, and as many more as there are tokens
# how much longer a tokenizer may make a text, and how much longer its maps of characters (SentencePiece's) may at most
MOST_GROWTH, MOST_GROWTH_OF_MAPS = 100, 10
JSON_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "specialists.json", SAFE_WEIGHTS_INDEX_NAME),
)
TEXT_FILES = ("chat_template.jinja", "merges.txt", "README.md")
# a folder of such files is loaded in place of its model.safetensors
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


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
            _refuse_values(found.items(), _SETTINGS, path)
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
            f"{os.fspath(folder)!r} holds {instead[0]!r}, too, which transformers would put into it or load in "
            "its place",
            "A model's folder holds one plain model",
            "Move that away; or merge an adapter first, `merge_and_unload()`.",
        )


def _check_growth(found: dict, path: str | os.PathLike) -> None:
    """Refuses a tokenizer whose replacements, one after another, make a text too long for the memory."""
    for part in ("normalizer", "decoder"):
        factor = 1.0
        for level in levels(found.get(part)):
            for step in (s for s in level if isinstance(s, dict) and s.get("type") in ("Replace", "Precompiled")):
                pattern, content = step.get("pattern"), step.get("content")
                replaced = pattern.get("String") if isinstance(pattern, dict) else pattern
                size = len(replaced) if isinstance(replaced, str) else 1
                factor *= max(len(content) / max(size, 1), 1) if isinstance(content, str) else MOST_GROWTH_OF_MAPS
        if factor > MOST_GROWTH:
            raise UnreadableFileError(
                f"replacements of the {part} in {os.fspath(path)!r} make a text {factor:.3g} times as long",
                f"A tokenizer's replacements make a text at most {MOST_GROWTH} times as long, because more would "
                "fill the memory",
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
            f"of {tokens:,} tokens in {os.fspath(path)!r} one has the number {str(highest)[:30]}",
            "Tokens are numbered from 0, almost without gaps, or the gaps would fill the memory",
        )


def check_config(path: str | os.PathLike, tensors: int | None = None) -> None:
    """Refuses a configuration with numbers of layers that nothing could have, or other numbers that are none.

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
                f"`{field}` of {os.fspath(path)!r} names other files, {str(raw[field])[:200]!r}",
                f"A model is read from config.json and {SAFE_WEIGHTS_NAME}",
                "Take the field out, and rename the files.",
            )
    most = MOST_LAYERS if tensors is None else tensors
    why = "none has so many" if tensors is None else f"the files hold {tensors} tensors in all"
    layers = (_LAYERS, _count_up_to(most), f"A number of layers is a whole number, and {why}")
    items = (item for level in levels(raw) for part in level if isinstance(part, dict) for item in part.items())
    _refuse_values(items, (*_NUMBERS, layers), path)


def _refuse_values(values: Iterable[tuple[str, Any]], rules: Iterable[tuple], path: str | os.PathLike) -> None:
    """Refuses the first value that breaks the rule for fields of its name: a pattern, what fits, and the rule in words."""
    for key, value in values:
        for pattern, fits, rule in rules:
            if value is not None and re.fullmatch(pattern, key) and not fits(value):
                fact = f"`{key}` of {os.fspath(path)!r} is {str(value)[:100]!r}"
                raise UnreadableFileError(fact, rule, "Correct it, or fetch the file again.")


def _count_up_to(most: int) -> Callable[[Any], bool]:
    # some fields hold one for each layer or part, whose tensors tell
    return lambda value: isinstance(value, list | dict) or (type(value) is int and 0 <= value <= most)


def _one_or_more(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(fits, value)) if isinstance(value, list) else fits(value)


_ids = _one_or_more(lambda value: type(value) is int and abs(value) < 1 << 31)
# settings of generation, which are read first when a text is generated
_SETTINGS = (
    (r"(bos|eos|pad|decoder_start|forced_bos|forced_eos)_token_id", _ids, "It is a token's number, or a list of such"),
    (
        r"(begin_)?suppress_tokens|bad_words_ids|force_words_ids",
        lambda value: isinstance(value, list) and all(map(_ids, value)),
        "It is a list of tokens' numbers",
    ),
    (r"architectures|stop_strings", _one_or_more(lambda value: isinstance(value, str)), "It is a list of words"),
    (
        r"(max|min)_(length|new_tokens)|num_(beams|beam_groups|return_sequences)|top_[hkp]|min_p|typical_p"
        r"|temperature|(repetition|length|diversity|encoder_repetition)_penalty|(epsilon|eta)_cutoff"
        r"|(encoder_)?no_repeat_ngram_size|guidance_scale|max_time|penalty_alpha",
        is_number,
        "It is a number",
    ),
    (
        r"do_sample|use_cache|output_(attentions|hidden_states|scores|logits)|remove_invalid_values|renormalize_logits",
        lambda value: isinstance(value, bool),
        "It is true or false",
    ),
)
_LAYERS = r"num_(\w+_)?layers|n_layers?|(en|de)coder_layers"
_READ_FIRST = "It is a number that is read before a model is built"
# fields that this package reads, or that no tensor's shape tells
_NUMBERS = (
    (
        r"max_position_embeddings",
        lambda value: type(value) is int and value > 0,
        "The longest context is a positive number of tokens",
    ),
    (r"(num|n)_(\w+_)?heads?", _count_up_to((1 << 31) - 1), _READ_FIRST),
    (
        r"sliding_window|attention_chunk_size|kv_lora_rank",
        lambda value: isinstance(value, int) and abs(value) < 1 << 63,
        _READ_FIRST,
    ),
    (
        r"\w*soft_?cap(ping)?|logits_scaling|logit_scale|\w+_multiplier|logits_mup_width_multiplier",
        is_number,
        _READ_FIRST,
    ),
)
