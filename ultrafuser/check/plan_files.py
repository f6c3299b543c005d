"""Reads what a plan asks for, for `ultrafuser check`: headers over the network, tokenizers only where hashes differ."""

from modeling_ultrafuser.lora_ultrafuser import WEIGHTS_FILE
from modeling_ultrafuser.plan_base_ultrafuser import Files, FusionPlan
from modeling_ultrafuser.reader_base_ultrafuser import BASE
from modeling_ultrafuser.refusals_ultrafuser import UnavailableError

from .metadata import Source, read
from .shared_tokenizer import first_of_each, highest_id_from_hashes


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
