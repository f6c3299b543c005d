"""One tokenizer out of the specialists'."""

import copy
import itertools
import json
import os
import re
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

from .files_ultrafuser import file_or_none, in_words
from .folder_ultrafuser import check_folder
from .gguf_ultrafuser import gguf_arguments, is_gguf
from .log_ultrafuser import print_line
from .lora_ultrafuser import adapter_config
from .refusals_ultrafuser import Refusal


# text that tells tokenizers apart which share a vocabulary but split differently
TOKENIZER_PROBE = (
    "def f(x_1):\n    return x_1 ** 2  # naïve 12345 + 6.7e-8\n\tThe Café’s “answer” is 42%. 日本語 🙂 <s> [INST]"
    "  The quick brown fox jumps over the lazy dog; it wasn't THEIR unbelievable re-examination of 1,048,576 ½ km.\r\n\n\n"
    '#include <stdio.h>\nint main(void) { for (int i = 0; i < 10; ++i) printf("%d\\t", i); return 0; }   \n'
    "\\frac{a^2+b^2}{2} \\geq ab, \\forall x\\in\\mathbb{R}: f'(x)=0 https://example.org/?q=a&b=c\n"
    "Größe, e\u0301tude, ﬁnally, Ⅷ, Привет, мир! مرحبا नमस्ते 안녕하세요 你好，世界。 \u00a0\u2003\u200b👩‍🔬\x00\ufffd"
)
# parts of a tokenizer that decide which text is which ids, and what its file says of them that does not
_PARTS = ("model", "normalizer", "pre_tokenizer", "decoder")
_OFFSETS = {"trim_offsets"}
# names that makers of vocabularies give to rows for tokens to come: <|reserved_special_token_0|>, <unused7>, [control_8]
_FREE = re.compile(
    r"\W+([\w▁ ]*(reserved|unused|place.?holder|dummy)[\w▁ ]*|control_\d+|special_\d+|extra_(id_)?\d+)\W+",
    re.IGNORECASE,
)


ONE_BASE = "Fuse specialists trained from one base model."
_SPLITS = "{!r} splits text differently from {!r} although the vocabularies are equal"


def common_tokenizer(
    specialists: dict[str, str | os.PathLike | PreTrainedTokenizerBase],
    *,
    chat_template: str | None = None,
    revisions: dict[str, str] | None = None,
    vocab_size: int | None = None,
    base: str | os.PathLike | None = None,
    **hub_kwargs,
) -> PreTrainedTokenizerBase:
    """The one tokenizer of a fused model, with its chat template.

    Args:
        specialists: Name to Hub id, local folder or loaded tokenizer.
        chat_template: Whose chat template to take, by specialist name. Needed only if they differ.
        revisions: Name to branch, tag or commit of its Hub repository.
        vocab_size: Rows of the fused head. Default: any.
        base: Where the base of specialists that are adapters is, if it is not where they say.
        **hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for `from_pretrained`.

    Returns:
        The tokenizer of the first specialist that fits the fused vocabulary, with the chosen template.

    Raises:
        ValueError: If the tokenizers differ, or their chat templates do and none was chosen.
    """
    hub = {n: {**hub_kwargs, "revision": (revisions or {}).get(n) or "main"} for n in specialists}
    tokenizers = {
        n: s if isinstance(s, PreTrainedTokenizerBase) else load_tokenizer(s, base, **hub[n])
        for n, s in specialists.items()
    }
    missing = [n for n, t in tokenizers.items() if t is None]
    if missing:
        raise Refusal(
            f"{missing} have no tokenizer",
            "Every specialist must come with its own",
            "Save it beside them.",
            about="tokenizer",
        )
    tokenizer = copy.deepcopy(widest_usable_tokenizer(tokenizers, vocab_size or 1 << 62))
    templates = {n: t.chat_template or None for n, t in tokenizers.items()}
    if chat_template is not None:
        if chat_template not in templates:
            raise Refusal(
                f"`chat_template` is {chat_template!r}",
                "It names the specialist whose template to take",
                f"Choose one of {list(templates)}.",
                about="tokenizer",
            )
        tokenizer.chat_template = templates[chat_template]
        ids = tokenizer.get_vocab()
        added = tokenizers[chat_template].get_added_vocab().items()
        if lost := [t for t, i in added if t in str(tokenizer.chat_template) and ids.get(t) != i]:
            print_line(
                f"The chat template of {chat_template} holds {_some(lost)}, which the fused model reads as ordinary text, "
                f"because not all specialists have a row for it."
            )
    elif len({repr(t) for t in templates.values()}) > 1:
        with_one = [n for n, t in templates.items() if t]
        raise Refusal(
            f"the specialists' chat templates differ ({with_one} have one)",
            "A fused model has one",
            f"Choose whose to take: chat_template={with_one[0]!r}.",
            about="tokenizer",
        )
    return tokenizer


def load_tokenizer(source, base=None, **hub) -> PreTrainedTokenizerBase | None:
    """A specialist's tokenizer, or None if its folder holds none. That of an adapter without one is its base's."""
    if is_gguf(source):
        # one beside the file is as its makers wrote it
        folder, file = gguf_arguments(source)
        chosen = {} if _has_tokenizer(folder) else file
        try:
            return without_code(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **chosen))
        # what is in a file is converted, and may be of any kind
        except Exception as error:
            raise Refusal(
                f"the tokenizer of {os.fspath(source)!r} cannot be read ({type(error).__name__}: {error})",
                "",
                "Save the one that it was made from beside the file.",
                about="tokenizer",
            ) from error
    adapter = adapter_config(source, **hub)
    if adapter is not None and not _has_tokenizer(source, **hub):
        revision = adapter.get("revision") if base is None else None
        source, hub = base or adapter["base_model_name_or_path"], {**hub, "revision": revision or "main"}
    if os.path.isdir(source) and not _has_tokenizer(source):
        return None
    if os.path.isdir(source):
        check_folder(source)
    with in_words("The tokenizer", source):
        # not None, which asks on the standard input
        tokenizer = AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **hub})
        # some settings are first read when it is used
        tokenizer.decode(tokenizer.encode(TOKENIZER_PROBE), skip_special_tokens=True)
        return without_code(tokenizer)


def without_code(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Takes out of a tokenizer which code it came with: saved beside a fused model, that would be run with the model's."""
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _has_tokenizer(source, **hub) -> bool:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if os.path.isdir(source):
        return any(os.path.exists(os.path.join(source, file)) for file in files)
    return file_or_none(source, "tokenizer_config.json", **hub) is not None


def widest_usable_tokenizer(
    tokenizers: dict[str, PreTrainedTokenizerBase], vocab_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer that knows most tokens, of those with no id beyond the fused vocabulary, once all agree below it.

    They agree if one has added tokens where others have nothing, or a reserved name: `tokenizer_notes` tells which.

    Raises:
        ValueError: If they do not agree, or all reach beyond the vocabulary.
    """
    ids = {n: t.get_vocab() for n, t in tokenizers.items()}
    vocabularies = {n: _tokens_by_id(ids[n], vocab_size) for n in tokenizers}
    only_some = list(_known_to_some(vocabularies).values())
    rule = "Specialists must share one tokenizer, because their predictions are added token by token"
    for pair in itertools.combinations(tokenizers, 2):
        told = _difference(pair, tokenizers, ids, vocabularies) or _split_differently(
            pair, tokenizers, ids, vocab_size, only_some
        )
        if told is not None:
            fact, way_out = told
            raise Refusal(fact, rule, way_out, about="tokenizer")
    beyond = {n: sorted(i for i in ids[n].values() if i >= vocab_size) for n in tokenizers}
    usable = [n for n in tokenizers if not beyond[n]]
    if not usable:
        shown = {n: [tokenizers[n].convert_ids_to_tokens(i) for i in more[:3]] for n, more in beyond.items()}
        raise Refusal(
            f"every tokenizer can produce tokens beyond the fused vocabulary of {vocab_size} rows, such as {shown}",
            "It has the rows that every specialist's head has",
            "Fuse specialists whose heads cover their tokenizers.",
            about="tokenizer",
        )
    return tokenizers[max(usable, key=lambda n: len(vocabularies[n]))]


def _difference(pair: tuple[str, str], tokenizers: dict, ids: dict, vocabularies: dict) -> tuple[str, str] | None:
    """Returns what differs between two vocabularies or their tokenizers' parts, and what to do; or None."""
    first, name = pair
    a, b = vocabularies[first], vocabularies[name]
    added = {n: set(tokenizers[n].get_added_vocab()) for n in pair}
    differing = sorted(i for i in a.keys() | b.keys() if a.get(i) != b.get(i))
    other = [i for i in differing if {a.get(i)} - added[first] - {None} or {b.get(i)} - added[name] - {None}]
    if other:
        i = other[0]
        fact = f"{name!r} uses a different tokenizer from {first!r}: {len(differing)} ids differ, the first is {i}"
        return f"{fact}, {a.get(i)!r} against {b.get(i)!r}", ONE_BASE
    if both := [i for i in differing if i in a and i in b]:
        i = both[0]
        fact = (
            f"{len(both)} of the tokens that were added to one vocabulary have other names in {name!r} than in {first!r}: "
            f"id {i} is {a[i]!r} in {first!r} and {b[i]!r} in {name!r}"
        )
        return fact, "If they mean the same, save one tokenizer beside both models; if not, leave one of the two out."
    places = {t: i for i, t in a.items()}
    if moved := [(t, i) for i, t in b.items() if places.get(t, i) != i]:
        token, i = moved[0]
        fact = f"the added token {token!r} has the id {places[token]} in {first!r} and {i} in {name!r}"
        return fact, "Leave one of the two out."
    if cut := [t for n, m in (pair, pair[::-1]) for t in added[n] - added[m] if t in ids[m]]:
        fact = f"{_SPLITS.format(name, first)}: only one of the two cuts {min(cut)!r} out of every text, as an added token"
        return fact, "Take it out of its added tokens."
    parts = [_parts(tokenizers[n], set(a.values()) & set(b.values())) for n in pair]
    if odd := [part for part in parts[0] if part in parts[1] and parts[0][part] != parts[1][part]]:
        return f"{_SPLITS.format(name, first)}: their tokenizers differ in {odd[0]}", ONE_BASE
    return None


def _split_differently(
    pair: tuple[str, str], tokenizers: dict, ids: dict, vocab_size: int, only_some: list[str]
) -> tuple[str, str] | None:
    """Returns how two tokenizers split a test sentence differently, and what to do; or None."""
    first, name = pair
    probe = TOKENIZER_PROBE
    for token in [*only_some, *(t for n in pair for t, i in ids[n].items() if i >= vocab_size)]:
        # tokens of blanks alone would cut ordinary text otherwise
        probe = probe.replace(token, "") if token.strip() else probe
    ours, theirs = (tokenizers[n].encode(probe, add_special_tokens=False) for n in pair)
    if [i for i in ours if i < vocab_size] == [i for i in theirs if i < vocab_size]:
        return None
    fact = f"{_SPLITS.format(name, first)}: a test sentence became {len(theirs)} tokens instead of {len(ours)}"
    return fact, ONE_BASE


def tokenizer_notes(
    tokenizers: dict[str, PreTrainedTokenizerBase], vocab_size: int, chosen: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """Describes how tokenizers differ of which `widest_usable_tokenizer` chose one: a sentence each, and the way out."""
    vocabularies = {n: _tokens_by_id(t.get_vocab(), vocab_size) for n, t in tokenizers.items()}
    only_some = _known_to_some(vocabularies)
    whose = next(n for n, t in tokenizers.items() if t is chosen)
    notes = []
    known = {n: [t for i, t in only_some.items() if i in v] for n, v in vocabularies.items()}
    if only_some:
        told = "; ".join(f"{n}: {_some(tokens)}" for n, tokens in known.items() if tokens)
        fact = f"Some added tokens are known to some specialists only, and nothing trained the others' rows for them: {told}."
        notes.append((fact, "Leave them out of prompts, or train the fused model on texts that hold them."))
    way_out = "For another's, save that one's tokenizer into the fused folder."
    blanks = {
        n: {t.content: (t.lstrip, t.rstrip, t.single_word) for t in tokenizer.added_tokens_decoder.values()}
        for n, tokenizer in tokenizers.items()
    }
    common = set.intersection(*map(set, blanks.values()))
    if odd := sorted(token for token in common if len({of[token] for of in blanks.values()}) > 1):
        fact = (
            f"Tokenizers differ in whether {_some(odd)} take in blanks beside them, or stand for whole words only; the fused "
            f"model's is that of {whose}."
        )
        notes.append((fact, way_out))
    for what, values in (
        ("put in front of a text", {n: _around(t)[0] for n, t in tokenizers.items()}),
        ("put behind a text", {n: _around(t)[1] for n, t in tokenizers.items()}),
        ("the end of text in training", {n: t.eos_token for n, t in tokenizers.items()}),
    ):
        if len({repr(v) for v in values.values()}) > 1:
            told = ", ".join(f"{n} {v!r}" if v else f"{n} nothing" for n, v in values.items())
            fact = f"Tokenizers differ in what is {what}: {told}; the fused model's is that of {whose}."
            notes.append((fact, way_out))
    return notes


def _tokens_by_id(ids: dict[str, int], vocab_size: int) -> dict[int, str]:
    """Tokens below the fused vocabulary's size, without names of rows that are kept free for tokens to come."""
    # most tokens begin with a letter, and are no such name
    return {i: t for t, i in ids.items() if i < vocab_size and (t[:1].isalnum() or not _FREE.fullmatch(t))}


def _known_to_some(vocabularies: dict[str, dict[int, str]]) -> dict[int, str]:
    """Tokens that are in some of the vocabularies, and not in all, by id."""
    to_all = set.intersection(*map(set, vocabularies.values()))
    return dict(sorted((i, t) for v in vocabularies.values() for i, t in v.items() if i not in to_all))


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Tokens that a tokenizer puts in front of a text, and behind it."""
    plain, marked = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    starts = range(len(marked) - len(plain) + 1)
    start = next((k for k in starts if marked[k : k + len(plain)] == plain), 0)
    return tuple(map(tokenizer.convert_ids_to_tokens, (marked[:start], marked[start + len(plain) :])))


def _some(tokens: list[str]) -> str:
    return ", ".join(map(repr, tokens[:8])) + (f" and {len(tokens) - 8} more" if len(tokens) > 8 else "")


def _parts(tokenizer: PreTrainedTokenizerBase, common: set[str]) -> dict[str, Any]:
    """Returns what decides how a tokenizer splits text: its parts by name, of the model only what makes tokens of both.

    Empty for a tokenizer that neither is one of the `tokenizers` library nor can be turned into one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        try:
            backend = convert_slow_tokenizer(tokenizer)
        except Exception:  # noqa: BLE001, of every kind
            return {}
    content = json.loads(backend.to_str())
    parts = {part: _without_offsets(content.get(part)) for part in _PARTS}
    model = parts.pop("model") or {}
    vocabulary = model.pop("vocab", {})
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model.pop("merges", None) or []]
    parts["merges"] = [pair for pair in merges if "".join(pair) in common]
    # of a unigram model each token has a score
    parts["scores"] = {t: s for t, s in vocabulary if t in common} if isinstance(vocabulary, list) else {}
    # where tokens that are not known go to is a number in some, and numbers are compared already
    return {**parts, **{key: value for key, value in model.items() if key != "unk_id"}}


def _without_offsets(part):
    if isinstance(part, list):
        return [_without_offsets(p) for p in part]
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key not in _OFFSETS}
    return part
