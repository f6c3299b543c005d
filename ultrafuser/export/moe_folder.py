"""Writes specialists as a stock mixture of experts: what `ultrafuser export` does.

Each specialist's feed-forward blocks become experts. Attention, norms, embeddings and head, of which a mixture has one, are
merged, or one specialist's. A router reads the hidden state of each layer. So it is another model than the fused one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.generation_config_ultrafuser import own_generation_config
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from trainers.progress import Progress

from ..atomic import new_folder, write_whole
from ..evaluation.held_out_files import read_domains
from ..evaluation.measurement import HeldOut, mean_loss
from ..hub.moe_card import write_moe_card
from ..merge.coefficients import dump
from ..merge.merged_folder import FolderMerge, loaded, prepare
from ..merge.sources import is_fused
from ..merge.written_tensors import write_tensors
from ..pretrained import save_tokenizer
from ..provenance import provenance
from . import layout_of
from .layout_base import Layout
from .routers import router_rows


RECORD = "export.json"
EXAMPLES, MAX_LENGTH, PROMPT_TOKENS = 128, 1024, 32
FEED_FORWARD = re.compile(r"model\.layers\.(\d+)\.mlp\.(\w+)\.weight")


class Made(NamedTuple):
    """A tensor of the mixture: its type, its shape, and what makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass
class MoeExport:
    """A mixture of experts, tensor by tensor.

    Attributes:
        merge: Of what the experts share.
        layout: Where everything goes.
        donor: Name of the specialist whose shared parts are taken in place of merged ones.
        routers: By specialist, its row of each layer's router. Shapes (layers, hidden).
    """

    merge: FolderMerge
    layout: Layout
    donor: str | None
    routers: Mapping[str, Tensor]

    @cached_property
    def config(self):
        """The mixture's configuration."""
        sources = self.merge.sources
        config = self.layout.config(sources.first.config, len(sources.names))
        config.tie_word_embeddings = not self.merge.untied
        return config

    @cached_property
    def tensors(self) -> dict[str, Made]:
        """Every tensor by its name in files."""
        found = {}
        for key, (dtype, shape) in self.merge.header.items():
            block = FEED_FORWARD.fullmatch(key)
            if block is None:
                found[key] = Made(dtype, shape, partial(self._shared, key))
                continue
            for k, model in enumerate(self.merge.sources.specialists.values()):
                name = self.layout.expert.format(layer=block[1], expert=k, part=self.layout.parts[block[2]])
                found[name] = Made(dtype, shape, partial(model.tensor, key))
        for layer in range(self.merge.sources.layers):
            found |= self._added(layer, next(iter(found.values())).dtype)
        return found

    def _shared(self, key: str) -> Tensor:
        if self.donor is None:
            return self.merge.tensor(key)
        return self.merge.sources.specialists[self.donor].read(key)

    def _added(self, layer: int, dtype: torch.dtype) -> dict[str, Made]:
        """Returns what no specialist has: a layer's router, and what is all 0."""
        shape = (len(self.routers), self.config.hidden_size)
        rows = partial(torch.stack, [rows[layer] for rows in self.routers.values()])
        empty = self.layout.zeros(self.merge.sources.first.config, layer)
        return {
            self.layout.router.format(layer=layer): Made(dtype, shape, rows),
            **{name: Made(dtype, shape, partial(torch.zeros, shape)) for name, shape in empty.items()},
        }

    def write(self, folder: Path) -> None:
        """Writes weights, configuration, tokenizer and a record."""
        made, sources = self.tensors, self.merge.sources
        with Progress("exporting", len(made)) as progress:
            header = {name: (one.dtype, one.shape) for name, one in made.items()}
            write_tensors(header, lambda name: made[name].make().to(made[name].dtype), folder, progress.add)
        config = self.config
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
        config.save_pretrained(folder)
        first = sources.first
        if (settings := own_generation_config(first.source, first.config, **first.hub)) is not None:
            settings.save_pretrained(folder)
        save_tokenizer(folder, sources.tokenizer)
        about = {"layout": config.model_type, "experts": sources.names, "sources": sources.origins}
        shared = {"donor": self.donor} if self.donor else {"method": self.merge.method}
        write_whole(folder / RECORD, dump(self.merge.coefficients, **provenance(), **about, **shared))


def export(
    what: list[str],
    to: str,
    out: Path,
    data: Mapping[str, str],
    *,
    method: str = "average",
    base: str | None = None,
    donor: str | None = None,
) -> dict[str, dict[str, float]]:
    """Writes specialists as a stock mixture of experts, and measures what that loses.

    Args:
        what: The folder of a fused model alone; or NAME=ID, NAME=ID@REVISION or NAME=FOLDER of each specialist.
        to: A name in `LAYOUTS`.
        out: Folder to write.
        data: Rows of each specialist's domain: the first half makes the routers, the second measures.
        method: How what the experts share is merged, as for `merge_folders`.
        base: As for `merge_folders`.
        donor: Name of the specialist whose attention, norms, embeddings and head are taken, in place of merging.

    Returns:
        Nats per token by domain, of the domain's `specialist`, the `fused` model if that is what was given, and `exported`.

    Raises:
        ValueError: If these specialists have no such layout, or a domain has no rows.
        OSError: If one cannot be read, or something else is in `out`.
    """
    layout = layout_of(to)
    with new_folder(out) as part, TemporaryDirectory(dir=part) as work:
        merge = prepare(what, Path(work), method=method, base=base)
        held = _checked(merge, layout, donor, data)
        merge.sources.check_numbers()
        routers, losses = {}, {name: {} for name in held}
        for name, source in merge.sources.specialists.items():
            with loaded(source) as model:
                routers[name] = router_rows(model, held[name][: _half(held[name])])
                losses[name]["specialist"] = mean_loss(model, held[name][_half(held[name]) :])
        MoeExport(merge, layout, donor, routers).write(part)
        _measure(losses, held, what, part)
        write_moe_card(part, out.name, merge.sources.ingredients, to, donor or merge.method, losses)
    return losses


def _half(held: HeldOut) -> int:
    return len(held) // 2


def _checked(merge: FolderMerge, layout: Layout, donor: str | None, data: Mapping[str, str]) -> dict[str, HeldOut]:
    sources = merge.sources
    for name, model in sources.specialists.items():
        layout.check(name, model.config)
    if merge.chosen.reads_inputs:
        way_out = "Choose another method, or merge first and take the result's folder."
        raise Refusal(f"the method is {merge.method!r}", "Rows of an export make its routers", way_out)
    if len(sources.names) < 2:
        raise Refusal(
            f"there is {sources.names} alone", "A mixture has two experts at least", "Name another specialist."
        )
    if donor is not None and merge.method != "average":
        raise Refusal("both a method and a donor are given", "Shared parts come from either", "Give one of them.")
    if donor is not None and donor not in sources.names:
        raise Refusal(f"the donor is {donor!r}", "It is one of the specialists", f"Choose one of {sources.names}.")
    if sorted(data) != sorted(sources.names):
        raise Refusal(
            f"there are rows of {sorted(data)}, and the specialists are {sorted(sources.names)}",
            "A router's rows are made of what each specialist reads on its own domain",
            "Pass --data NAME=FILE.jsonl for each.",
        )
    if sources.tokenizer is None:
        raise Refusal("no folder holds a tokenizer", "Rows are read by one", "Save it beside the first specialist.")
    limits = {"max_length": MAX_LENGTH, "prompt_tokens": PROMPT_TOKENS}
    held = read_domains(data, sources.tokenizer, examples=EXAMPLES, **limits)
    if few := [name for name, rows in held.items() if len(rows) < 2]:
        raise Refusal(f"there is one row of {few}", "Half of the rows are measured on", "Pass two or more.")
    return held


def _measure(losses: dict[str, dict[str, float]], held: Mapping[str, HeldOut], what: list[str], folder: Path) -> None:
    """Adds the losses of the fused model, if there is one, and of the exported one."""
    models = {"exported": (AutoModelForCausalLM, folder)}
    if is_fused(Path(what[0])):
        models = {"fused": (UltraFuserForCausalLM, what[0]), **models}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, (cls, place) in models.items():
        model = cls.from_pretrained(place, dtype="auto").to(device).eval()
        for name, rows in held.items():
            losses[name][kind] = mean_loss(model, rows[_half(rows) :])
        del model


def table(losses: Mapping[str, Mapping[str, float]]) -> Table:
    """Shows losses by domain."""
    kinds = list(next(iter(losses.values())))
    shown = Table("", *kinds, caption="nats per token of rows that no router was made of")
    for name, of in losses.items():
        shown.add_row(name, *(f"{of[kind]:.3f}" for kind in kinds))
    return shown
