"""A plan of a fusion: what is to be fused, what the checks learned of it, and how files are read."""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_ultrafuser import UltraFuserConfig
from .lora_ultrafuser import Adapters, adapter_file
from .refusals_ultrafuser import UnavailableError
from .safetensors_ultrafuser import FLOATS, Header, read_header, read_headers, weight_files


FITS, WARNING, BLOCKS = "fits", "warning", "blocks"


@dataclass
class Finding:
    """One thing that was checked.

    Attributes:
        about: What was checked, in a word or two.
        status: "fits", "warning" or "blocks".
        text: What was found.
        fix: What to do about it, if anything can be.
        lines: What fusing logs of it.
    """

    about: str
    status: str
    text: str
    fix: str = ""
    lines: tuple[str, ...] = ()


class Files:
    """Reads what lies beside the weights of specialists. What is on the Hub is downloaded, weights included."""

    def locate(self, name: str, source, hub: dict) -> tuple[Any, dict]:
        """Returns where a specialist is read from: a Hub id, folder or model, and options of `from_pretrained`."""
        return source, hub

    def header(self, name: str, source, hub: dict) -> dict:
        """Returns type and shape of each tensor of a whole model's files.

        Raises:
            UnavailableError: If it has no safetensors.
            UnreadableFileError: If they are damaged.
        """
        files = weight_files(source, **hub)
        if files is None:
            raise UnavailableError(
                f"the weights of {name!r} could not be read from {os.fspath(source)!r}",
                "Only the safetensors format is read, because others can run code",
                "Load and save the model once to convert it.",
                about="weights",
            )
        return read_headers(files)

    def adapter_header(self, name: str, source, hub: dict) -> dict:
        """Returns the same of an adapter's file."""
        return read_header(adapter_file(name, source, **hub))

    def tokenizers_to_compare(self, plan: "FusionPlan") -> tuple[list[str], int]:
        """Returns names of specialists whose tokenizers must be compared, and how many others are known to equal one."""
        return [n for n, s in plan.specialists.items() if not isinstance(s, PreTrainedModel)], 0


@dataclass
class FusionPlan:
    """Specialists to be fused, and what the checks learned of them.

    Attributes:
        specialists: Name to Hub id, folder or model in memory.
        hub: Name to options of `from_pretrained`, such as `revision`.
        choices: Fields of the fused configuration: gate, fusion rule.
        dtype: The one asked for, "auto" for what all share; then that one, or None if no configuration says it.
        base: Where the base of specialists that are adapters is, if it is not where they say.
        hub_options: Options of `from_pretrained` for all.
        files: How files are read.
        names: All names that were given.
        adapters: The specialists' adapters, where they are adapters of one base.
        whole: What is loaded, by name: each specialist, or the base alone.
        places: Of each of `whole`, options of `from_pretrained`.
        configs: Of each of `whole`, its configuration.
        texts: Of each of `whole`, the configuration of its text part, cut to the fused vocabulary.
        rows: Of each of `whole`, the rows of its own vocabulary.
        vocab_size: Rows of the fused vocabulary.
        parts: Of each specialist, its adapter's matrices by layer, without numbers.
        config: Of the fused model.
        tokenizers: By name, as far as they had to be compared.
        generation_config: Of the fused model.
        models: Of each of `whole`, its model without numbers; or the one in memory.
        headers: Of each of `whole` in safetensors, type and shape of each tensor.
    """

    specialists: dict[str, Any]
    hub: dict[str, dict]
    choices: dict[str, Any]
    dtype: str | torch.dtype | None = "auto"
    base: str | os.PathLike | None = None
    hub_options: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=Files)
    names: list[str] = field(init=False)
    adapters: Adapters | None = None
    whole: dict[str, Any] = field(init=False)
    places: dict[str, dict] = field(init=False)
    configs: dict[str, PreTrainedConfig] = field(default_factory=dict)
    texts: dict[str, PreTrainedConfig] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    vocab_size: int | None = None
    parts: dict[str, dict] = field(default_factory=dict)
    config: UltraFuserConfig | None = None
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    generation_config: GenerationConfig | None = None
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    headers: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        self.names = list(self.specialists)
        self.whole, self.places = dict(self.specialists), dict(self.hub)

    @property
    def number_type(self) -> torch.dtype | None:
        """The dtype of the fused model, from the files of the first specialist where no configuration says it."""
        if self.dtype == "auto":
            return None
        return self.dtype or next((_stored_dtype(header) for header in self.headers.values()), None)

    def leave_out(self, name: str) -> None:
        """Takes a specialist, or the base, out of what is still to be checked."""
        for known in (self.specialists, self.whole, self.places, self.configs, self.texts, self.rows, self.models):
            known.pop(name, None)
        if not self.specialists:
            # of a base alone nothing is left to check
            self.whole, self.texts = {}, {}


def _stored_dtype(header: Header) -> torch.dtype | None:
    """Returns the dtype that most numbers of a header have."""
    counts = Counter()
    for dtype, shape in header.values():
        counts[dtype] += math.prod(shape)
    return FLOATS.get(max(counts, key=counts.get, default=None))
