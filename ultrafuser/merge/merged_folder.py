"""Merges folders of specialists into a folder of one ordinary model, tensor by tensor: what `ultrafuser merge` does."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling_ultrafuser.generation_config_ultrafuser import own_generation_config
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.safetensors_ultrafuser import FLOATS
from trainers.progress import Progress

from ..atomic import new_folder, write_whole
from ..compress.full_models import Checkpoint
from ..evaluation.held_out_files import read_domains
from ..evaluation.measurement import HeldOut
from ..hub.merge_card import write_merge_card
from ..pretrained import load_model, save_tokenizer
from ..provenance import provenance
from . import merge_method
from .coefficients import Coefficients, check_layers, dump, parse_coefficients
from .layer_inputs import inner_products
from .merge_base import Merge, NotMergeableError
from .merged_model import seed_of
from .sources import Sources, read_sources
from .written_tensors import write_tensors


RECORD = "merge.json"
EXAMPLES, MAX_LENGTH, PROMPT_TOKENS = 64, 1024, 1


@dataclass
class FolderMerge:
    """A merge of models that are read one tensor at a time.

    Attributes:
        sources: What is merged.
        method: How, in a word: a name in `MERGES` and its setting.
        coefficients: Factor of every specialist, row by row.
        seed: Of what DARE drops.
        inputs: Files of the inner products of each specialist's layers' inputs, if the method reads them.
    """

    sources: Sources
    method: str
    coefficients: Coefficients
    seed: int = 0
    inputs: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self):
        self.chosen = merge_method(self.method)

    @property
    def untied(self) -> bool:
        """Returns whether the merged model has a head of its own: if any specialist has."""
        return any(not model.is_tied for model in self.sources.all)

    @cached_property
    def header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor of the merged model."""
        first = self.sources.first
        shapes = {key: (FLOATS[dtype], shape) for key, (dtype, shape) in first.header.items()}
        head = first.file_key(first.head)
        if self.untied and head not in shapes:
            shapes[head] = shapes[first.key(first.head)]
        return shapes

    def tensor(self, key: str) -> Tensor:
        """Merges one tensor, in the type that the first specialist has it in."""
        models = self.sources.specialists.values()
        torch.manual_seed(seed_of(self.seed, key))
        tensors = [model.read(key) for model in models]
        merged = self.chosen.merged(
            self.sources.start.read(key), tensors, self.coefficients.of(key), self._inputs(key)
        )
        merged = merged.to(self.header[key][0]).contiguous()
        if not merged.isfinite().all():
            raise Refusal(
                f"`{key}` of the merged model holds numbers that are not finite",
                "Weights must be finite numbers",
                "Look for them in the specialists, or choose smaller coefficients.",
            )
        return merged

    def _inputs(self, key: str) -> list[Tensor] | None:
        found = []
        for file in self.inputs.values():
            with safe_open(file, "pt") as products:
                if key in products.keys():  # noqa: SIM118, it is no dict
                    found.append(products.get_tensor(key))
        # a head that one specialist ties to its embedding is averaged
        return found if found and len(found) == len(self.inputs) else None

    def write(self, folder: Path, done: Callable[[], None] = lambda: None) -> None:
        """Writes the merged model with its configuration, tokenizer and table of coefficients.

        Args:
            folder: Folder to write to.
            done: Called after each tensor.
        """
        first = self.sources.first
        write_tensors(self.header, self.tensor, folder, done)
        config = copy.deepcopy(first.config)
        config.architectures = [type(first.model).__name__]
        if self.untied:
            config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
        config.save_pretrained(folder)
        if (settings := own_generation_config(first.source, first.config, **first.hub)) is not None:
            settings.save_pretrained(folder)
        if self.sources.tokenizer is not None:
            save_tokenizer(folder, self.sources.tokenizer)
        about = {"method": self.method, "seed": self.seed, "sources": self.sources.origins}
        write_whole(folder / RECORD, dump(self.coefficients, **provenance(), **about))


def merge_folders(
    what: list[str],
    out: Path,
    *,
    method: str = "average",
    base: str | None = None,
    coefficients: str | None = None,
    lines: str | None = None,
    data: Mapping[str, str] | None = None,
    search: Callable[[FolderMerge, Mapping[str, HeldOut], Path], None] | None = None,
    seed: int = 0,
) -> Coefficients:
    """Merges specialists into the folder of one ordinary model, which any engine loads.

    At most a gigabyte of the result and one tensor of each model are in memory; for a method that reads layers' inputs, one
    specialist.

    Args:
        what: NAME=ID, NAME=ID@REVISION or NAME=FOLDER of each specialist; or the folder of a fused model alone.
        out: Folder to write.
        method: A name in `MERGES`; a colon and its setting, if it has one, as in "ties:0.2".
        base: The model that all were tuned from: ID, ID@REVISION or folder.
        coefficients: Factors of the changes: a number for all; NAME=NUMBER of each with commas between them; or a JSON file
            of a table, as a merge writes it.
        lines: START,SLOPE of LiNeS: factors that rise from START at the first layer by SLOPE to the last.
        data: Rows by domain: of each specialist's, for a method that reads layers' inputs; of any, for a search.
        search: Called with the merge, the rows and a folder for trials, to set the coefficients.
        seed: Of what DARE drops.

    Returns:
        The table of coefficients.

    Raises:
        ValueError: If these cannot be merged so.
        OSError: If one cannot be read, or something else is in `out`.
    """
    with new_folder(out) as part, TemporaryDirectory(dir=part) as work:
        merge = prepare(what, Path(work), method=method, base=base, coefficients=coefficients, lines=lines, seed=seed)
        _check_data(merge, data or {}, search is not None)
        limits = {"examples": EXAMPLES, "max_length": MAX_LENGTH, "prompt_tokens": PROMPT_TOKENS}
        held = read_domains(data or {}, merge.sources.tokenizer, **limits)
        merge.sources.check_numbers()
        if merge.chosen.reads_inputs:
            _read_inputs(merge, held, Path(work))
        if search is not None:
            search(merge, held, Path(work))
        with Progress("merging", len(merge.header)) as progress:
            merge.write(part, progress.add)
        write_merge_card(part, out.name, merge.sources.ingredients, merge.method, merge.coefficients)
    return merge.coefficients


def prepare(
    what: list[str],
    work: Path,
    *,
    method: str,
    base: str | None = None,
    coefficients: str | None = None,
    lines: str | None = None,
    seed: int = 0,
) -> FolderMerge:
    """Reads and checks everything but numbers. See `merge_folders`."""
    chosen = merge_method(method)
    _check_choices(chosen, method, base, coefficients, lines)
    sources = read_sources(what, base, work)
    names, layers = sources.names, sources.layers
    table = chosen.table(names, layers)
    if table is None and lines is not None:
        table = Coefficients.lines(names, layers, *_two_numbers(lines))
    if table is None:
        table = parse_coefficients(coefficients, chosen.default(len(names)), names, layers)
    if not table.is_even:
        check_layers(sources.first.header, layers)
    if base is None and chosen.scales and any(abs(sum(row) / len(row) - 1) > 1e-6 for row in table.rows):
        raise NotMergeableError(
            f"Without a base only an average of weights is defined, whose coefficients have a mean of 1, but they are "
            f"{table.rows[0]}. Pass the model that all specialists were tuned from with --base."
        )
    return FolderMerge(sources, method, table, seed)


def _check_choices(chosen: Merge, method: str, base: str | None, coefficients: str | None, lines: str | None) -> None:
    if base is None and chosen.needs_base:
        raise NotMergeableError(
            f"{method!r} works on what each specialist changed, but no base was given. Pass the model that all specialists "
            f"were tuned from with --base."
        )
    if lines is not None and coefficients is not None:
        raise Refusal("both --lines and --coefficients are given", "Either makes the whole table", "Give one of them.")
    if (coefficients is not None or lines is not None) and not chosen.scales:
        raise Refusal(
            f"{method!r} is given {'--coefficients' if lines is None else '--lines'}",
            "It decides itself how much it takes of each layer",
            "Leave them out, or choose `task_arithmetic`.",
        )


def _two_numbers(lines: str) -> tuple[float, float]:
    try:
        start, slope = map(float, lines.split(","))
    except ValueError:
        start = slope = math.nan
    if not math.isfinite(start + slope):
        raise Refusal(f"--lines is {lines!r}", "LiNeS has a start and a slope", "Write both, as in 0.33,0.5.")
    return start, slope


def _check_data(merge: FolderMerge, data: Mapping[str, str], searches: bool) -> None:
    """Refuses rows that nothing reads, and what reads rows without any."""
    chosen, names = merge.chosen, merge.sources.names
    if searches and not (data and chosen.scales and merge.sources.base is not None):
        raise Refusal(
            f"a search for coefficients of {merge.method!r} has {'rows' if data else 'no rows'} and "
            f"{'no base' if merge.sources.base is None else 'a base'}",
            "It varies the factors of changes from a base, of methods that scale with them, and measures on rows",
            "Pass --base and --data, and choose such as `task_arithmetic` or `ties`.",
        )
    if data and not (searches or chosen.reads_inputs):
        rule = "Rows are for RegMean and for --search"
        raise Refusal(f"--data is given, and {merge.method!r} reads no rows", rule, "Leave --data out.")
    if chosen.reads_inputs and sorted(data) != sorted(names):
        raise Refusal(
            f"there are rows of {sorted(data)}, and the specialists are {sorted(names)}",
            f"{merge.method!r} runs each specialist on rows of its own domain",
            "Pass --data NAME=FILE.jsonl for each.",
        )
    if data and merge.sources.tokenizer is None:
        raise Refusal("no folder holds a tokenizer", "Rows are read by one", "Save it beside the first specialist.")


def _read_inputs(merge: FolderMerge, held: Mapping[str, HeldOut], work: Path) -> None:
    """Runs each specialist on rows of its domain, one after another, and keeps what RegMean reads in files."""
    files = {}
    with Progress("reading rows", len(held)) as progress:
        for name, source in merge.sources.specialists.items():
            with loaded(source) as model:
                products = inner_products(model, held[name])
            files[name] = work / f"inputs-{name}.safetensors"
            save_file({source.file_key(layer): product for layer, product in products.items()}, files[name])
            progress.add()
    merge.inputs = files


@contextmanager
def loaded(source: Checkpoint) -> Iterator:
    """Loads a model for a while."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield load_model(source.source, dtype="auto", **source.hub).to(device).eval()
