"""A fused model without its specialists, as a small folder that says where they are; and the whole model from it again.

While only the gate has been trained, everything else in a fused folder can be had from the specialists. A reference
recipe holds what cannot: the gate, the configuration, and a file `refs.yaml` with the specialists' ids, commits and the
SHA-256 of what is read of them.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.checkpoint_ultrafuser import refuse_other_tensors
from modeling_ultrafuser.gates_ultrafuser import gate_word
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.safetensors_ultrafuser import read_header
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer

from ..atomic import new_folder
from ..check.checks import Judgement
from ..check.metadata import Source, parse
from ..pretrained import fused_config, read_ingredients, save_fused
from . import reference_file
from .fusion_recipe import FusionRecipe, FusionSettings, commits
from .reference_file import GATE_FILE, RECIPE, TOKENIZER, Reference, refused
from .specialist_edits import BACKBONE, GATE, HEAD, built


def refer(
    folder: Path,
    out: Path,
    *,
    specialists: list[str] | None = None,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the reference recipe of a fused folder whose specialists are untouched.

    Args:
        folder: Of the fused model. It is not changed.
        out: The folder to write. There must be nothing in it.
        specialists: NAME=ID, NAME=ID@COMMIT or NAME=FOLDER of each, if the folder does not say where they come from.
        base: Where the base of specialists that are adapters is, if it is not where they say.
        say: Called with a line about each step.

    Raises:
        FileExistsError: If there is something in `out`.
        ValueError: If a tensor other than the gate's is not as the specialists give it.
        OSError: If a specialist cannot be read.
    """
    config = fused_config(folder)
    reference = _origins(folder, config, specialists)
    reference.base = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    with new_folder(out) as part:
        reference_file.refuse_code(folder)
        recipe = _recipe(reference, config)
        judgement = recipe.plan()
        reference.specialist_revisions = commits(judgement.sources)
        say("comparing with the specialists")
        model = UltraFuserForCausalLM.from_pretrained(folder)
        _check_untouched(model, recipe.fuse(judgement.sources).state_dict(), reference.specialists)
        save_file({k: t for k, t in model.state_dict().items() if k.startswith(GATE)}, part / GATE_FILE)
        shutil.copy(folder / "config.json", part)
        model.generation_config.save_pretrained(part)
        _keep_tokenizer(folder, part, reference)
        say("reading SHA-256")
        reference.specialist_sha256 = {name: _hashes(source) for name, source in judgement.sources.items()}
        if judgement.base is not None:
            reference.base_sha256 = _hashes(judgement.base)
        # the lock is no part of it
        own = sorted(path for path in part.iterdir() if not path.name.startswith("."))
        reference.sha256 = {path.name: reference_file.sha256(path) for path in own}
        written = {key: value for key, value in asdict(reference).items() if value}
        (part / RECIPE).write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")


@dataclass
class ReferenceRecipe:
    """A recipe that rebuilds one fused model, bit for bit.

    Attributes:
        file: The recipe's `refs.yaml`, with what was written beside it.
        reference: What it says.
    """

    file: Path
    reference: Reference
    out = None

    @classmethod
    def read(cls, file: Path) -> "ReferenceRecipe | None":
        """Reads a reference recipe. Any other recipe is None. See `read_reference`."""
        reference = reference_file.read_reference(file)
        return None if reference is None else cls(file, _in_order(reference, fused_config(file.parent)))

    def choose(self, choices: dict[str, Any], dtype: str | None = None) -> "ReferenceRecipe":
        """Rejects any choice: the recipe rebuilds one model."""
        if choices or dtype:
            raise Refusal(
                f"{sorted(choices) + ['dtype'] * bool(dtype)} were chosen",
                "A reference recipe rebuilds one model and leaves nothing to choose",
                "Leave them out, or fuse the specialists anew.",
                about="recipe",
            )
        return self

    def plan(self) -> Judgement:
        """Checks the specialists without their weights, see `FusionRecipe.plan`."""
        return _recipe(self.reference, fused_config(self.file.parent)).plan()

    def build(self, out: Path, *, say: Callable[[str], None] = print) -> None:
        """Writes the self-contained folder of the fused model.

        Args:
            out: The folder to write. There must be nothing in it.
            say: Called with a line about each step.

        Raises:
            FileExistsError: If there is something in `out`.
            ValueError: If a file is not the one that the recipe was made from.
            OSError: If a specialist cannot be read, or the disk is too small.
        """
        here, config, reference = self.file.parent, fused_config(self.file.parent), self.reference
        recipe = _recipe(reference, config)
        with new_folder(out) as part:
            judgement, tokenizer = recipe.fetch(part, say=say)
            sources = judgement.sources
            say("reading SHA-256")
            pairs = [(sources[name], reference.specialist_sha256[name]) for name in reference.specialists]
            if judgement.base is not None:
                pairs.append((judgement.base, reference.base_sha256))
            for source, files in pairs:
                reference_file.check_pinned(source.location, _read_of(source), files)
                for name, expected in files.items():
                    reference_file.check_sha256(_path(source, name), expected)
            say("fusing")
            state = recipe.fuse(sources).state_dict()
            state |= _read_gate(here / GATE_FILE, {k: t for k, t in state.items() if k.startswith(GATE)})
            model = built(config, state, _dtype(config))
            model.generation_config = GenerationConfig.from_pretrained(here)
            say("writing")
            save_fused(part, model, _with_template(tokenizer, reference), recipe.origins(sources))
            for name in set(reference.sha256) & set(TOKENIZER):
                shutil.copy(here / name, part)


def read_recipe(specialists: dict[str, str] | Path) -> FusionRecipe | ReferenceRecipe:
    """Makes a recipe of specialists by name, or reads one.

    Args:
        specialists: Name to Hub id or folder; or a YAML file, a recipe for fusing or a reference.

    Raises:
        ValueError: If the file holds neither, or is damaged.
        OSError: If it cannot be read.
    """
    if isinstance(specialists, dict):
        return FusionRecipe(FusionSettings(specialists))
    return ReferenceRecipe.read(specialists) or FusionRecipe.read(specialists)


def _in_order(reference: Reference, config: UltraFuserConfig) -> Reference:
    """The same with its specialists in the order of the gate's columns, which the order of a file's keys is not.

    Raises:
        ValueError: If it names others than the configuration.
    """
    names = config.specialist_names
    if set(reference.specialists) != set(names):
        fact = f"the recipe names {sorted(reference.specialists)}, and config.json {sorted(names)}"
        raise refused(fact, "A reference recipe names the specialists of the configuration beside it")
    return replace(reference, specialists={name: reference.specialists[name] for name in names})


def _read_gate(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gate's tensors, if the file holds just those.

    Raises:
        ValueError: Naming one that is missing, left over, or of another shape or type.
    """
    header = read_header(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    refuse_other_tensors(
        f"the gate {str(path)!r}",
        shapes.keys() - header.keys(),
        header.keys() - shapes.keys(),
        {(key, header[key][1], shape) for key, shape in shapes.items() if key in header and header[key][1] != shape},
    )
    found = load_file(path)
    if odd := next((key for key, tensor in found.items() if tensor.dtype != expected[key].dtype), None):
        fact = f"`{odd}` of {str(path)!r} is {found[odd].dtype}"
        raise refused(fact, f"A gate's tensors are {expected[odd].dtype}")
    return found


def _recipe(reference: Reference, config: UltraFuserConfig) -> FusionRecipe:
    """Returns the recipe of the same model with a new gate."""
    # without a choice, templates that differ are refused; whatever this one is, the tokenizer's own is put in its place
    template = reference.chat_template or next(iter(reference.specialists))
    sources = (reference.specialists, reference.specialist_revisions)
    fusion = FusionSettings(
        *sources, template, gate_word(config), config.fusion, config.gate_sparsifier, reference.base
    )
    if config.signed_weights is not None:
        fusion.signed_weights = dict(zip(config.specialist_names, config.signed_weights, strict=True))
    return FusionRecipe(fusion, _dtype(config))


def _dtype(config: UltraFuserConfig) -> str:
    return "auto" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _origins(folder: Path, config: UltraFuserConfig, specialists: list[str] | None) -> Reference:
    """Returns the specialists' origins: as given, else as the folder says."""
    if specialists:
        found = parse(specialists)
    else:
        found = {n: (i["source"], i.get("commit")) for n, i in read_ingredients(folder).items()}
    if list(found) != config.specialist_names:
        raise refused(
            f"{str(folder)!r} is made of {config.specialist_names} and the sources are known of {list(found)}",
            "A reference recipe says where each specialist comes from",
            "Name them, in that order: `--specialists NAME=ID` for each.",
        )
    # a folder must be found from wherever the recipe is read
    places = {n: str(Path(place).resolve()) if Path(place).exists() else place for n, (place, _) in found.items()}
    return Reference(places, {n: revision for n, (_, revision) in found.items() if revision})


def _check_untouched(model: UltraFuserForCausalLM, expected: dict[str, Tensor], places: dict[str, str]) -> None:
    """Refuses a model of which more than the gate is not as its specialists give it.

    Raises:
        ValueError: Naming specialists and tensors.
    """
    differing = {}
    for key, tensor in model.state_dict().items():
        if key == HEAD:
            # one part of all, where they share it
            widths = list({c.start: c.stop - c.start for c in model.head_columns()}.values())
            pairs = zip(
                model.model.specialists, tensor.split(widths, -1), expected[key].split(widths, -1), strict=True
            )
            for name, own, theirs in pairs:
                if not _same_bits(own, theirs):
                    differing.setdefault(name, []).append("head")
        elif not key.startswith(GATE) and not _same_bits(tensor, expected[key]):
            name, _, rest = key.removeprefix(BACKBONE).partition(".")
            differing.setdefault(name, []).append(rest)
    if differing:
        what = "; ".join(
            f"{len(keys)} of {n!r} ({places.get(n, 'and adapters of it')}), the first is `{keys[0]}`"
            for n, keys in differing.items()
        )
        raise refused(
            f"tensors differ from those of the specialists: {what}",
            "A reference recipe holds the gate alone and takes the specialists as they were published",
            "If stage two trained them, pass the folder on as it is: `ultrafuser push FOLDER OWNER/NAME`.",
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(integers), other.view(integers))


def _keep_tokenizer(folder: Path, part: Path, reference: Reference) -> None:
    """Copies those files of the tokenizer that are not as the specialists give them, and notes whose template it has."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return
    revisions = reference.specialist_revisions
    for name, place in reference.specialists.items():
        own = load_tokenizer(place, reference.base, revision=revisions.get(name) or "main")
        if own is not None and own.chat_template == tokenizer.chat_template:
            reference.chat_template = name
            break
    with tempfile.TemporaryDirectory() as made:
        choice = reference.chat_template or next(iter(reference.specialists))
        rows = fused_config(folder).vocab_size
        own = {"revisions": revisions, "base": reference.base}
        common = common_tokenizer(reference.specialists, chat_template=choice, vocab_size=rows, **own)
        _with_template(common, reference).save_pretrained(made)
        for file in TOKENIZER:
            given, own = Path(made, file), folder / file
            if own.exists() and not (given.exists() and given.read_bytes() == own.read_bytes()):
                shutil.copy(own, part)


def _with_template(tokenizer: PreTrainedTokenizerBase, reference: Reference) -> PreTrainedTokenizerBase:
    if reference.chat_template is None:
        tokenizer.chat_template = None
    return tokenizer


def _hashes(source: Source) -> dict[str, str]:
    """SHA-256 of what is read of a specialist, or of a base, by file."""
    return {file: reference_file.sha256(_path(source, file)) for file in _read_of(source)}


def _read_of(source: Source) -> list[str]:
    """Names of the files that fusing reads of a specialist."""
    read = ("config.json", "generation_config.json", "adapter_config.json", SAFE_WEIGHTS_INDEX_NAME, *TOKENIZER)
    # a GGUF file is all there is of its specialist
    weights = source.sizes if source.weights is None else source.weights
    return list(dict.fromkeys(file for file in (*read, *weights) if file in source.sizes))


def _path(source: Source, file: str) -> Path:
    """Returns the path of a specialist's file on this machine."""
    # offline, a repository is read from its folder in the Hub's cache
    if Path(source.location).exists():
        return source.folder / file
    return Path(hf_hub_download(source.location, file, revision=source.commit))
