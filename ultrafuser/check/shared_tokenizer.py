"""Whether specialists share one tokenizer, told from hashes where they are equal, so that nothing need be downloaded."""

import json
import re

from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.gguf_ultrafuser import is_gguf
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer, tokenizer_notes, widest_usable_tokenizer

from .findings import FITS, WARNING, Judgement, each
from .metadata import Source


# what a tokenizer's configuration says beside which text becomes which ids
_OTHER = {
    *("chat_template", "model_max_length", "max_length", "padding_side", "truncation_side", "name_or_path"),
    *("transformers_version", "processor_class", "model_input_names"),
    *("clean_up_tokenization_spaces", "is_local", "backend"),
}
# whatever a tokenizer is made from
_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def judge_tokenizers(found: Judgement, sources: dict[str, Source], texts: dict, rows: int) -> None:
    """Notes whether ids mean the same for all, and which rows of the vocabulary are left."""
    sizes = {n: c.vocab_size for n, c in texts.items()}
    highest = _highest_id_from_hashes(sources)
    lost: dict[str, list[str]] = {}
    if highest is not None and highest < rows:
        found.note("tokenizer", FITS, "the same for all, told from the hashes of the files on the Hub.")
    else:
        first = _first_of_each(sources)
        with found.refusals("tokenizer"):
            loaded = _load(found, {n: sources[n] for n in first})
            if loaded:
                chosen = widest_usable_tokenizer(loaded, rows)
                told = ", some of it told from the hashes of the files on the Hub" if len(first) < len(sources) else ""
                notes = tokenizer_notes(loaded, rows, chosen)
                for note in notes:
                    text, _, fix = note.partition(". ")
                    found.note("tokenizer", WARNING, text + ".", fix)
                if not notes:
                    found.note("tokenizer", FITS, f"the same for all{told}.")
                beyond = {n: sorted(i for i in t.get_vocab().values() if i >= rows) for n, t in loaded.items()}
                lost = {n: loaded[n].convert_ids_to_tokens(ids[:3]) for n, ids in beyond.items() if ids}
    if set(sizes.values()) == {rows}:
        found.note("vocabulary", FITS, f"{rows} rows in each.")
        return
    text = f"cut to {rows} rows, the smallest of {each(sizes)}; "
    if lost:
        text += f"tokens beyond them are lost, such as {each(lost)}."
        found.note("vocabulary", WARNING, text, "Prompts with those tokens are for the specialist alone.")
    else:
        found.note("vocabulary", FITS, text + "no token uses the others.")


def _first_of_each(sources: dict[str, Source]) -> list[str]:
    """Names of specialists, of those whose tokenizers are equal by their hashes only the first."""
    prints = {n: _fingerprint(s) or n for n, s in sources.items()}
    return [n for k, n in enumerate(prints) if prints[n] not in list(prints.values())[:k]]


def _load(found: Judgement, sources: dict[str, Source]) -> dict:
    loaded = {}
    for name, source in sources.items():
        tokenizer = load_tokenizer(source.location, revision=source.revision, trust_remote_code=False)
        if tokenizer is None:
            text = f"{name}: its folder holds none, so nothing tells that its token ids mean the same."
            found.note("tokenizer", WARNING, text, "Save it beside the model: `ultrafuser fuse` needs it.")
        else:
            loaded[name] = tokenizer
    return loaded


def _highest_id_from_hashes(sources: dict[str, Source]) -> int | None:
    """The highest token id, if all tokenizers are equal by their hashes and say what it is; otherwise None."""
    prints = {_fingerprint(s) for s in sources.values()}
    if len(prints) > 1 or None in prints:
        return None
    added = _tokenizer_config(next(iter(sources.values()))).get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(re.fullmatch(r"[0-9]{1,9}", key) for key in added):
        return None
    highest = max(map(int, added), default=0)
    # tokens that were added to a vocabulary have the ids behind it; control tokens within it, the ids at its start
    return highest if highest > 1000 else None


def _fingerprint(source: Source) -> str | None:
    """Equal for two specialists only if their tokenizers are; None if that cannot be told."""
    if "tokenizer.json" not in source.hashes:
        return None
    own = {key: value for key, value in _tokenizer_config(source).items() if key not in _OTHER}
    # which class reads the files may follow from the architecture
    kind = _json(source, "config.json").get("model_type")
    return json.dumps([kind, own, [source.hashes.get(f) for f in _FILES]], sort_keys=True)


def _tokenizer_config(source: Source) -> dict:
    return _json(source, "tokenizer_config.json")


def _json(source: Source, file: str) -> dict:
    path = source.folder / file
    return read_json(path) if path.exists() else {}


def judge_templates(found: Judgement, sources: dict[str, Source]) -> None:
    """Notes whether one chat template is right for all."""
    templates = {n: _template(s) or None for n, s in sources.items()}
    with_one = [n for n, t in templates.items() if t]
    if len({repr(t) for t in templates.values()}) > 1:
        text = f"they differ, and a fused model has one ({', '.join(with_one)} have one)."
        fix = f"Choose whose to take: `ultrafuser fuse ... --chat-template {with_one[0]}`."
        found.note("chat template", WARNING, text, fix)
    elif with_one:
        found.note("chat template", FITS, "the same for all.")
    else:
        found.note("chat template", FITS, "none has one: the fused model continues plain text.")


def _template(source: Source) -> str | None:
    if is_gguf(source.location):
        return load_tokenizer(source.location).chat_template
    path = source.folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else _tokenizer_config(source).get("chat_template")
