"""One tokenizer and one generation configuration out of the specialists'."""

import copy
import os

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from .lora_ultrafuser import adapter_config


logger = logging.get_logger(__name__)


# text that tells tokenizers apart which share a vocabulary but split differently
TOKENIZER_PROBE = (
    "def f(x_1):\n    return x_1 ** 2  # naïve 12345 + 6.7e-8\n\tThe Café’s “answer” is 42%. 日本語 🙂 <s> [INST]"
)


# written by some versions and not by others, and no choice of how to generate
_NOT_SETTINGS = (
    *("transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states"),
)


def print_line(line: str) -> None:
    """Tells the user what was decided on the way, once, at the library's own verbosity."""
    logger.warning(line)


def common_tokenizer(
    specialists: dict[str, str | os.PathLike | PreTrainedTokenizerBase],
    *,
    chat_template: str | None = None,
    revisions: dict[str, str] | None = None,
    vocab_size: int | None = None,
    **hub_kwargs,
) -> PreTrainedTokenizerBase:
    """The one tokenizer of a fused model, with its chat template.

    Args:
        specialists: Name to Hub id, local folder or loaded tokenizer.
        chat_template: Whose chat template to take, by specialist name. Needed only if they differ.
        revisions: Name to branch, tag or commit of its Hub repository.
        vocab_size: Rows of the fused head. Default: any.
        **hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for `from_pretrained`.

    Returns:
        The tokenizer of the first specialist that fits the fused vocabulary, with the chosen template.

    Raises:
        ValueError: If the tokenizers differ, or their chat templates do and none was chosen.
    """
    hub = {n: {**hub_kwargs, "revision": (revisions or {}).get(n) or "main"} for n in specialists}
    tokenizers = {
        n: s if isinstance(s, PreTrainedTokenizerBase) else load_tokenizer(s, **hub[n]) for n, s in specialists.items()
    }
    missing = [n for n, t in tokenizers.items() if t is None]
    if missing:
        raise ValueError(
            f"Every specialist must come with its tokenizer, but {missing} have none. Save it beside them."
        )
    tokenizer = copy.deepcopy(widest_usable_tokenizer(tokenizers, vocab_size or 1 << 62))
    templates = {n: t.chat_template for n, t in tokenizers.items()}
    if chat_template is not None:
        if chat_template not in templates:
            raise ValueError(
                f"`chat_template` names the specialist whose template to take: one of {list(templates)}, "
                f"but got {chat_template!r}."
            )
        tokenizer.chat_template = templates[chat_template]
    elif len({repr(t) for t in templates.values()}) > 1:
        with_one = [n for n, t in templates.items() if t]
        raise ValueError(
            f"A fused model has one chat template, but the specialists' differ ({with_one} have one). Choose whose to "
            f"take: chat_template={with_one[0]!r}."
        )
    return tokenizer


def load_tokenizer(source, **hub) -> PreTrainedTokenizerBase | None:
    """A specialist's tokenizer, or None if its folder holds none. That of an adapter without one is its base's."""
    adapter = adapter_config(source, **hub)
    if adapter is not None and not _has_tokenizer(source, **hub):
        source, hub = adapter["base_model_name_or_path"], {**hub, "revision": adapter.get("revision") or "main"}
    if os.path.isdir(source) and not _has_tokenizer(source):
        return None
    return AutoTokenizer.from_pretrained(source, **hub)


def _has_tokenizer(source, **hub) -> bool:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if os.path.isdir(source):
        return any(os.path.exists(os.path.join(source, file)) for file in files)
    try:
        return cached_file(source, "tokenizer_config.json", **hub) is not None
    except OSError:
        return False


def widest_usable_tokenizer(
    tokenizers: dict[str, PreTrainedTokenizerBase], vocab_size: int
) -> PreTrainedTokenizerBase:
    """The first tokenizer with no id beyond the fused vocabulary, once all agree below it."""
    vocabularies = {n: {i: t for t, i in k.get_vocab().items() if i < vocab_size} for n, k in tokenizers.items()}
    first = next(iter(tokenizers))
    for name in list(tokenizers)[1:]:
        a, b = vocabularies[first], vocabularies[name]
        differing = sorted(i for i in a.keys() | b.keys() if a.get(i) != b.get(i))
        rule = "Specialists must share one tokenizer, because their predictions are added token by token"
        if differing:
            i = differing[0]
            raise ValueError(
                f"{rule}, but {name!r} uses a different tokenizer from {first!r}: {len(differing)} ids differ, the "
                f"first is {i}, {a.get(i)!r} against {b.get(i)!r}. Fuse specialists trained from one base model."
            )
        ours, theirs = (tokenizers[n].encode(TOKENIZER_PROBE, add_special_tokens=False) for n in (first, name))
        if [i for i in ours if i < vocab_size] != [i for i in theirs if i < vocab_size]:
            raise ValueError(
                f"{rule}, but {name!r} splits text differently from {first!r} although the vocabularies are equal: a "
                f"test sentence became {len(theirs)} tokens instead of {len(ours)}. Fuse specialists trained from one "
                f"base model."
            )
    beyond = {n: sorted(i for i in t.get_vocab().values() if i >= vocab_size) for n, t in tokenizers.items()}
    usable = [n for n in tokenizers if not beyond[n]]
    if not usable:
        shown = {n: [tokenizers[n].convert_ids_to_tokens(i) for i in ids[:3]] for n, ids in beyond.items()}
        raise ValueError(
            f"The fused vocabulary has the {vocab_size} rows that every specialist's head has, but every tokenizer "
            f"can produce tokens beyond it, such as {shown}. Fuse specialists whose heads cover their tokenizers."
        )
    return tokenizers[usable[0]]


def own_generation_config(source, config: PreTrainedConfig, **hub) -> GenerationConfig | None:
    """What a specialist's own model would have, without loading it."""
    if isinstance(source, PreTrainedModel):
        return getattr(source, "generation_config", None)
    try:
        return GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        return GenerationConfig.from_model_config(config)


def merged_generation_config(configs: dict[str, GenerationConfig | None], vocab_size: int) -> GenerationConfig:
    """One generation configuration for all: any specialist's end of text ends the text, conflicts are dropped.

    Raises:
        ValueError: If an end-of-text id lies beyond the fused vocabulary.
    """
    written = {n: {} if c is None else c.to_diff_dict() for n, c in configs.items()}
    for fields in written.values():
        for key in _NOT_SETTINGS:
            fields.pop(key, None)
    ends = {n: f.pop("eos_token_id", None) for n, f in written.items()}
    ends = {n: e if isinstance(e, list) else [] if e is None else [e] for n, e in ends.items()}
    beyond = {n: [i for i in ids if i >= vocab_size] for n, ids in ends.items()}
    if any(beyond.values()):
        raise ValueError(
            f"Every end-of-text id must be in the fused vocabulary of {vocab_size} tokens, or the model could not "
            f"stop, but { ({n: ids for n, ids in beyond.items() if ids}) } lie beyond it. Fuse specialists whose "
            f"vocabularies all contain them."
        )
    eos = sorted({i for ids in ends.values() for i in ids})
    starts, pads = ([f.pop(key, None) for f in written.values()] for key in ("bos_token_id", "pad_token_id"))
    bos = next((i for i in starts if i is not None and i < vocab_size), None)
    pad = next((i for i in pads if i is not None and i < vocab_size), eos[0] if eos else None)
    merged = {}
    for key in sorted({k for fields in written.values() for k in fields}):
        values = {n: f.get(key) for n, f in written.items()}
        if len({repr(v) if v is not False else "None" for v in values.values()}) == 1:
            merged[key] = next(iter(values.values()))
        else:
            print_line(f"Generation setting `{key}` is dropped, because specialists disagree on it: {values}.")
    if not merged.get("do_sample"):
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if merged.pop(key, None) is not None:
                print_line(
                    f"Generation setting `{key}` is dropped, because the fused model does not sample by default."
                )
    end = eos[0] if len(eos) == 1 else eos or None
    return GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=pad, **merged)
