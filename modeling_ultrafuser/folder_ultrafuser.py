"""Checks of the small files in a model's folder, before transformers reads them."""

import os
import re

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
_HEADS = re.compile(r"(num|n)_(\w+_)?heads?")
_LAYERS = re.compile(r"num_(\w+_)?layers|n_layers?|(en|de)coder_layers")
_WINDOWS = re.compile(r"sliding_window|attention_chunk_size|kv_lora_rank")
_SCALES = re.compile(r"\w*soft_?cap(ping)?|logits_scaling|logit_scale|\w+_multiplier|logits_mup_width_multiplier")
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

    numbers = (
        r"(max|min)_(length|new_tokens)|num_(beams|beam_groups|return_sequences)|top_[hkp]|min_p|typical_p"
        r"|temperature|(repetition|length|diversity|encoder_repetition)_penalty|(epsilon|eta)_cutoff"
        r"|(encoder_)?no_repeat_ngram_size|guidance_scale|max_time|penalty_alpha"
    )
    switches = (
        r"do_sample|use_cache|output_(attentions|hidden_states|scores|logits)|remove_invalid_values"
        r"|renormalize_logits"
    )
    named_ids = r"(bos|eos|pad|decoder_start|forced_bos|forced_eos)_token_id"
    for key, value in found.items():
        for pattern, fits, what in (
            (named_ids, ids, "a token's number, or a list of such"),
            (r"(begin_)?suppress_tokens|bad_words_ids|force_words_ids", words_of_ids, "a list of tokens' numbers"),
            (r"architectures|stop_strings", words, "a list of words"),
            (numbers, is_number, "a number"),
            (switches, lambda v: isinstance(v, bool), "true or false"),
        ):
            if re.fullmatch(pattern, key) and value is not None and not fits(value):
                raise UnreadableFileError(
                    f"`{key}` of {os.fspath(path)!r} is {str(value)[:100]!r}", f"It is {what}", "Correct it."
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
                f"`{field}` of {os.fspath(path)!r} names other files, {str(raw[field])[:200]!r}",
                f"A model is read from config.json and {SAFE_WEIGHTS_NAME}",
                "Take the field out, and rename the files.",
            )
    most = MOST_LAYERS if tensors is None else tensors
    why = "none has so many" if tensors is None else f"the files hold {tensors} tensors in all"
    items = (item for level in levels(raw) for part in level if isinstance(part, dict) for item in part.items())
    for key, value in items:
        if value is None:
            continue
        if key == "max_position_embeddings" and not (type(value) is int and value > 0):
            raise UnreadableFileError(
                f"`{key}` of {os.fspath(path)!r} is {str(value)[:40]!r}",
                "The longest context is a positive number of tokens",
                "Correct it.",
            )
        if not _fits(key, value):
            raise UnreadableFileError(
                f"`{key}` of {os.fspath(path)!r} is {str(value)[:100]!r}",
                "It is a number that is read before a model is built",
                "Correct it.",
            )
        counts_layers = _LAYERS.fullmatch(key) and not isinstance(value, list | dict)
        if counts_layers and not (type(value) is int and 0 <= value <= most):
            raise UnreadableFileError(
                f"`{key}` of {os.fspath(path)!r} is {repr(value)[:40]}",
                f"A number of layers is a whole number, and {why}",
                "Correct it, or fetch the file again.",
            )
    return raw


def _fits(key: str, value) -> bool:
    """Returns whether a field that this package reads, or that no tensor's shape tells, is a number."""
    if _HEADS.fullmatch(key) and not isinstance(value, list | dict):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    if _WINDOWS.fullmatch(key):
        return isinstance(value, int) and abs(value) < 1 << 63
    return not _SCALES.fullmatch(key) or is_number(value)
