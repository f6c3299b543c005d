"""A fused model without its specialists, as a small folder that says where they are; and the whole model from it again.

While only the gate has been trained, everything else in a fused folder can be had from the specialists. A reference
recipe holds what cannot: the gate, the configuration, and a file `refs.yaml` with the specialists' ids, commits and the
SHA-256 of what is read of them.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.utils.sha import sha_fileobj
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.checkpoint_ultrafuser import refuse_other_tensors
from modeling_ultrafuser.files_ultrafuser import check_file, read_json
from modeling_ultrafuser.safetensors_ultrafuser import read_header
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer

from ..atomic import new_folder
from ..check.metadata import Source, parse
from ..fused_folders import fused_config, read_ingredients, save_fused
from ..yaml_files import read_yaml
from .fusion_recipe import Fusion, check_words, commits, described, fetch, plan
from .specialist_edits import BACKBONE, GATE, HEAD, built


RECIPE, GATE_FILE = "refs.yaml", "gate.safetensors"
TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
# what is read of the files beside the recipe
BESIDE = ("config.json", "generation_config.json", GATE_FILE, *TOKENIZER)


@dataclass
class Reference:
    """What `refs.yaml` says.

    Attributes:
        specialists: Name to Hub id or folder.
        specialist_revisions: Name to commit, for those on the Hub.
        chat_template: Whose chat template the tokenizer has; None if nobody's.
        sha256: Of the files beside `refs.yaml`, by name.
        specialist_sha256: Of the files that are read of each specialist, by name.
        base_sha256: Of those that are read of their base, where specialists are adapters of one.
        base: Where that is, if it is not where they say.
    """

    specialists: dict[str, str]
    specialist_revisions: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    specialist_sha256: dict[str, dict[str, str]] = field(default_factory=dict)
    base_sha256: dict[str, str] = field(default_factory=dict)
    base: str | None = None


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
        _refuse_code(folder)
        judgement = plan(_recipe(reference, config), _dtype(config))
        reference.specialist_revisions = commits(judgement.sources)
        say("comparing with the specialists")
        model = UltraFuserForCausalLM.from_pretrained(folder)
        _check_untouched(model, _fused(reference, config).state_dict(), reference.specialists)
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
        reference.sha256 = {path.name: sha256(path) for path in own}
        written = {key: value for key, value in asdict(reference).items() if value}
        (part / RECIPE).write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")


def rebuild(file: Path, reference: Reference, out: Path, *, say: Callable[[str], None] = print) -> None:
    """Writes the self-contained folder of a fused model from its reference recipe, bit for bit as it was.

    Args:
        file: The recipe, with what was written beside it.
        reference: What it says, see `read`.
        out: The folder to write. There must be nothing in it.
        say: Called with a line about each step.

    Raises:
        FileExistsError: If there is something in `out`.
        ValueError: If a file is not the one that the recipe was made from.
        OSError: If a specialist cannot be read, or the disk is too small.
    """
    here, config = file.parent, fused_config(file.parent)
    reference = _in_order(reference, config)
    with new_folder(out) as part:
        judgement, tokenizer = fetch(_recipe(reference, config), part, dtype=_dtype(config), say=say)
        sources = judgement.sources
        say("reading SHA-256")
        pairs = [(sources[name], reference.specialist_sha256[name]) for name in reference.specialists]
        if judgement.base is not None:
            pairs.append((judgement.base, reference.base_sha256))
        for source, files in pairs:
            _check_pinned(source.location, _read_of(source), files)
            for name, expected in files.items():
                _check(_path(source, name), expected)
        say("fusing")
        state = _fused(reference, config).state_dict()
        state |= _read_gate(here / GATE_FILE, {k: t for k, t in state.items() if k.startswith(GATE)})
        model = built(config, state, _dtype(config))
        model.generation_config = GenerationConfig.from_pretrained(here)
        say("writing")
        ingredients = {n: described(reference.specialists[n], s) for n, s in sources.items()}
        save_fused(part, model, _with_template(tokenizer, reference), ingredients)
        for name in set(reference.sha256) & set(TOKENIZER):
            shutil.copy(here / name, part)


def read(file: Path) -> Reference | None:
    """Reads `refs.yaml`, and whether what is beside it is what was written with it. Any other recipe is None.

    Raises:
        ValueError: If it has fields that are unknown, or a file is another one.
        OSError: If it cannot be read.
    """
    raw = read_yaml(file)
    if not isinstance(raw, dict) or "specialist_sha256" not in raw:
        return None
    known = [f.name for f in fields(Reference)]
    if set(raw) - {*known}:
        raise ValueError(
            f"A reference recipe has the fields {known}, but {str(file)!r} has {sorted(set(raw) - {*known})}, too. "
            f"Have it written anew: `ultrafuser refer FUSED`."
        )
    reference = _checked(Reference(**{"specialists": None, **raw}))
    _check_pinned(file.parent, [path.name for path in file.parent.iterdir() if path.name in BESIDE], reference.sha256)
    for name, expected in reference.sha256.items():
        _check(file.with_name(name), expected)
    _refuse_code(file.parent)
    return reference


def _refuse_code(folder: Path) -> None:
    """Refuses a tokenizer that names code: it would be run with the model's, once the model is loaded."""
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise ValueError(
            f"A reference recipe keeps a tokenizer as it is, and one that brings no code, but {str(settings)!r} has an "
            f"`auto_map`. Take that out; then have the reference written anew: `ultrafuser refer FUSED`."
        )


def _checked(reference: Reference) -> Reference:
    """The same, once its fields are of the right kinds and name files of one folder each.

    Raises:
        ValueError: Naming the field.
    """
    hashes = {"sha256": reference.sha256, "base_sha256": reference.base_sha256}
    check_words("specialists", reference.specialists)
    check_words("specialist_revisions", reference.specialist_revisions)
    for name, files in (
        reference.specialist_sha256.items() if isinstance(reference.specialist_sha256, dict) else [("", 0)]
    ):
        hashes[f"specialist_sha256 of {name!r}"] = files
    for field_name, files in hashes.items():
        check_words(field_name, files)
        if odd := [name for name in files if name in (".", "..") or re.search(r"[/\\\0]", name)]:
            raise ValueError(
                f"A reference recipe pins files of the folders that it names, but `{field_name}` names {odd[0]!r}. Have it "
                f"written anew: `ultrafuser refer FUSED`."
            )
    if set(reference.specialist_sha256) != set(reference.specialists):
        raise ValueError(
            f"A reference recipe pins the files of every specialist, but it names {sorted(reference.specialists)} and pins "
            f"files of {sorted(reference.specialist_sha256)}. Have it written anew: `ultrafuser refer FUSED`."
        )
    for field_name in ("chat_template", "base"):
        value = getattr(reference, field_name)
        if not isinstance(value, str | None):
            raise ValueError(
                f"`{field_name}` of a reference recipe is a name, but it is {str(value)[:200]!r}. Correct it."
            )
    return reference


def _in_order(reference: Reference, config: UltraFuserConfig) -> Reference:
    """The same with its specialists in the order of the gate's columns, which the order of a file's keys is not.

    Raises:
        ValueError: If it names others than the configuration.
    """
    names = config.specialist_names
    if set(reference.specialists) != set(names):
        raise ValueError(
            f"A reference recipe names the specialists of the configuration beside it, but it names "
            f"{sorted(reference.specialists)}, and config.json {sorted(names)}. Have it written anew: `ultrafuser refer FUSED`."
        )
    return replace(reference, specialists={name: reference.specialists[name] for name in names})


def _check_pinned(folder, read: list[str], pinned: dict[str, str]) -> None:
    if loose := sorted(set(read) - set(pinned)):
        raise ValueError(
            f"A reference recipe pins every file that is read, but of {str(folder)!r} it pins {sorted(pinned)} and not "
            f"{loose[0]!r}. Take that file away, or have the recipe written anew: `ultrafuser refer FUSED`."
        )


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
        raise ValueError(
            f"A gate's tensors are {expected[odd].dtype}, but `{odd}` of {str(path)!r} is {found[odd].dtype}."
        )
    return found


def as_recipe(file: Path, reference: Reference) -> tuple[Fusion, str]:
    """The recipe and the dtype of the same model with a new gate."""
    config = fused_config(file.parent)
    return _recipe(_in_order(reference, config), config), _dtype(config)


def _recipe(reference: Reference, config: UltraFuserConfig) -> Fusion:
    # without a choice, templates that differ are refused; whatever this one is, the tokenizer's own is put in its place
    template = reference.chat_template or next(iter(reference.specialists))
    return Fusion(
        reference.specialists, reference.specialist_revisions, template, config.gate, config.fusion, reference.base
    )


def _dtype(config: UltraFuserConfig) -> str:
    return "auto" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def _check(path: Path, expected: str) -> None:
    if path.exists():
        check_file(path)
    found = sha256(path) if path.exists() else None
    if found != expected:
        is_other = f"has the SHA-256 {found} instead of {expected}" if found else "is not there"
        raise ValueError(
            f"A reference recipe rebuilds a model from the very files that it was made from, but {str(path)!r} "
            f"{is_other}. Fetch that file again; one from the Hub with `hf download --force-download`."
        )


def _origins(folder: Path, config: UltraFuserConfig, specialists: list[str] | None) -> Reference:
    """Where the specialists come from: as told, or else as the folder says."""
    if specialists:
        found = parse(specialists)
    else:
        found = {n: (i["source"], i.get("commit")) for n, i in read_ingredients(folder).items()}
    if list(found) != config.specialist_names:
        raise ValueError(
            f"A reference recipe says where each specialist comes from, but {str(folder)!r} is made of "
            f"{config.specialist_names} and the sources are known of {list(found)}. Name them, in that order: "
            f"`--specialists NAME=ID` for each."
        )
    # a folder must be found from wherever the recipe is read
    places = {n: str(Path(place).resolve()) if Path(place).exists() else place for n, (place, _) in found.items()}
    return Reference(places, {n: revision for n, (_, revision) in found.items() if revision})


def _fused(reference: Reference, config: UltraFuserConfig) -> UltraFuserForCausalLM:
    """The specialists fused as they come, with a new gate."""
    return UltraFuserForCausalLM.from_specialists(
        reference.specialists,
        gate=config.gate,
        fusion=config.fusion,
        gate_hidden_size=config.gate_hidden_size,
        gate_calibration=config.gate_calibration,
        dtype=_dtype(config),
        revisions=reference.specialist_revisions,
        base=reference.base,
    )


def _check_untouched(model: UltraFuserForCausalLM, expected: dict[str, Tensor], places: dict[str, str]) -> None:
    """Refuses a model of which more than the gate is not as its specialists give it.

    Raises:
        ValueError: Naming specialists and tensors.
    """
    differing = {}
    for key, tensor in model.state_dict().items():
        if key == HEAD:
            widths = [c.hidden_size for c in model.config.backbones]
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
        raise ValueError(
            f"A reference recipe holds the gate alone and takes the specialists as they were published, but tensors "
            f"differ: {what}. If stage two trained them, pass the folder on as it is: `ultrafuser push FOLDER OWNER/NAME`."
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
    return {file: sha256(_path(source, file)) for file in _read_of(source)}


def _read_of(source: Source) -> list[str]:
    """Names of the files that fusing reads of a specialist."""
    read = ("config.json", "generation_config.json", "adapter_config.json", SAFE_WEIGHTS_INDEX_NAME, *TOKENIZER)
    # a GGUF file is all there is of its specialist
    weights = source.sizes if source.weights is None else source.weights
    return list(dict.fromkeys(file for file in (*read, *weights) if file in source.sizes))


def _path(source: Source, file: str) -> Path:
    """Where a file of a specialist is on this machine."""
    # offline, a repository is read from its folder in the Hub's cache
    if Path(source.location).exists():
        return source.folder / file
    return Path(hf_hub_download(source.location, file, revision=source.commit))
