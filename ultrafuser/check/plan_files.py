"""Reads what a plan asks for, for `ultrafuser check`: headers over the network, tokenizers only where hashes differ."""

import json
import re
from collections.abc import Iterator

from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.gguf_ultrafuser import is_gguf
from modeling_ultrafuser.lora_ultrafuser import WEIGHTS_FILE
from modeling_ultrafuser.plan_base_ultrafuser import FITS, WARNING, Files, Finding, FusionPlan
from modeling_ultrafuser.reader_base_ultrafuser import BASE
from modeling_ultrafuser.refusals_ultrafuser import UnavailableError
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer

from .metadata import ADDED, VOCABULARY, Source, read


# what a tokenizer's configuration says beside which text becomes which ids
_OTHER = {
    *("chat_template", "model_max_length", "max_length", "padding_side", "truncation_side", "name_or_path"),
    *("transformers_version", "processor_class", "model_input_names"),
    *("clean_up_tokenization_spaces", "is_local", "backend"),
}


class MetadataFiles(Files):
    """Reads of each specialist its small files and the headers of its weights, and keeps them.

    Attributes:
        sources: What was read of each specialist, by name.
    """

    def __init__(self):
        self.sources: dict[str, Source] = {}
        self._by_place: dict[tuple, Source] = {}

    def locate(self, name: str, source: str, hub: dict) -> tuple[str, dict]:
        """Reads a specialist, or a base, at one commit. See `Files`."""
        known = read(name, source, hub["revision"])
        self._by_place[known.location, known.revision] = known
        if name != BASE or name not in self.sources:
            self.sources[name] = known
        return known.location, {"revision": known.revision}

    def source_at(self, location: str, hub: dict) -> Source:
        """Returns what was read at a place that `locate` returned."""
        return self._by_place[location, hub["revision"]]

    def header(self, name: str, source: str, hub: dict) -> dict:
        """Returns type and shape of each tensor of a whole model. See `Files`."""
        return _readable(name, self.source_at(source, hub)).header

    def adapter_header(self, name: str, source: str, hub: dict) -> dict:
        """Returns the same of an adapter. See `Files`."""
        return _readable(name, self.source_at(source, hub)).weights[WEIGHTS_FILE]

    def with_tokenizer(self, plan: FusionPlan, name: str) -> Source:
        """Returns where a specialist's tokenizer is: an adapter may come without one, and has its base's."""
        source = self.source_at(plan.specialists[name], plan.hub[name])
        if plan.adapters is None or "tokenizer_config.json" in source.sizes:
            return source
        return self.source_at(plan.whole[BASE], plan.places[BASE])

    def tokenizers_to_compare(self, plan: FusionPlan) -> tuple[list[str], int]:
        """Returns names of specialists whose tokenizers differ by their hashes, and the number of others."""
        sources = {name: self.with_tokenizer(plan, name) for name in plan.specialists}
        highest = highest_id_from_hashes(sources)
        names = [] if highest is not None and highest < plan.vocab_size else first_of_each(sources)
        return names, len(sources) - len(names)


def _readable(name: str, source: Source) -> Source:
    if source.problem:
        raise UnavailableError(
            f"the weights of {name!r} cannot be read: {source.problem}",
            "Only whole safetensors are read, because other formats can run code",
            "Download it again, or load and save the model once to convert it.",
            about="weights",
        )
    return source


def first_of_each(sources: dict[str, Source]) -> list[str]:
    """Names of specialists, of those whose tokenizers are equal by their hashes only the first."""
    prints = {n: _fingerprint(s) or n for n, s in sources.items()}
    return [n for k, n in enumerate(prints) if prints[n] not in list(prints.values())[:k]]


def highest_id_from_hashes(sources: dict[str, Source]) -> int | None:
    """The highest token id, if all tokenizers are equal by their hashes and say what it is; otherwise None."""
    prints = {_fingerprint(s) for s in sources.values()}
    if len(prints) > 1 or None in prints:
        return None
    added = _json(next(iter(sources.values()))).get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(re.fullmatch(r"[0-9]{1,9}", key) for key in added):
        return None
    highest = max(map(int, added), default=0)
    # tokens that were added to a vocabulary have the ids behind it; control tokens within it, the ids at its start
    return highest if highest > 1000 else None


def _fingerprint(source: Source) -> str | None:
    """Equal for two specialists only if their tokenizers are; None if that cannot be told."""
    if "tokenizer.json" not in source.hashes:
        return None
    own = {key: value for key, value in _json(source).items() if key not in _OTHER}
    # which class reads the files may follow from the architecture
    kind = _json(source, "config.json").get("model_type")
    return json.dumps([kind, own, [source.hashes.get(f) for f in (*VOCABULARY, *ADDED)]], sort_keys=True)


def _json(source: Source, file: str = "tokenizer_config.json") -> dict:
    path = source.folder / file
    return read_json(path) if path.exists() else {}


def compare_templates(sources: dict[str, Source]) -> Iterator[Finding]:
    """Yields whether one chat template is right for all."""
    templates = {n: _template(s) or None for n, s in sources.items()}
    with_one = [n for n, t in templates.items() if t]
    if len({repr(t) for t in templates.values()}) > 1:
        text = f"they differ, and a fused model has one ({', '.join(with_one)} have one)."
        fix = f"Choose whose to take: `ultrafuser fuse ... --chat-template {with_one[0]}`."
        yield Finding("chat template", WARNING, text, fix)
    elif with_one:
        yield Finding("chat template", FITS, "the same for all.")
    else:
        yield Finding("chat template", FITS, "none has one: the fused model continues plain text.")


def _template(source: Source) -> str | None:
    if is_gguf(source.location):
        return load_tokenizer(source.location).chat_template
    path = source.folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else _json(source).get("chat_template")
