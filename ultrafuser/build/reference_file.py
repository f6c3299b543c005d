"""The file of a reference recipe: which specialists, at which commits, with which SHA-256 of every file that is read."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from modeling_ultrafuser.files_ultrafuser import check_file, read_json
from modeling_ultrafuser.refusals_ultrafuser import Refusal

from ..check.metadata import ADDED, VOCABULARY
from ..compat import sha256_of
from ..yaml_files import read_yaml
from .fusion_recipe import check_words


RECIPE, GATE_FILE = "refs.yaml", "gate.safetensors"
TOKENIZER = (*VOCABULARY, "tokenizer_config.json", *ADDED, "chat_template.jinja")
# what is read of the files beside the recipe
BESIDE = ("config.json", "generation_config.json", GATE_FILE, *TOKENIZER)


@dataclass
class Reference:
    """Content of `refs.yaml`.

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


def refused(fact: str, rule: str, way_out: str = "Have it written anew: `ultrafuser refer FUSED`.") -> Refusal:
    """Returns the error about a reference recipe."""
    return Refusal(fact, rule, way_out, about="reference")


def read_reference(file: Path) -> Reference | None:
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
        fact = f"{str(file)!r} has {sorted(set(raw) - {*known})}, too"
        raise refused(fact, f"A reference recipe has the fields {known}")
    reference = _checked(Reference(**{"specialists": None, **raw}))
    check_pinned(file.parent, [path.name for path in file.parent.iterdir() if path.name in BESIDE], reference.sha256)
    for name, expected in reference.sha256.items():
        check_sha256(file.with_name(name), expected)
    refuse_code(file.parent)
    return reference


def refuse_code(folder: Path) -> None:
    """Refuses a tokenizer that names code: it would be run with the model's, once the model is loaded."""
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in read_json(settings):
        raise refused(
            f"{str(settings)!r} has an `auto_map`",
            "A reference recipe keeps a tokenizer as it is, and one that brings no code",
            "Take that out; then have the reference written anew: `ultrafuser refer FUSED`.",
        )


def _checked(reference: Reference) -> Reference:
    """The same, once its fields are of the right kinds and name files of one folder each.

    Raises:
        ValueError: Naming the field.
    """
    hashes = {"sha256": reference.sha256, "base_sha256": reference.base_sha256}
    check_words("specialists", reference.specialists)
    check_words("specialist_revisions", reference.specialist_revisions)
    pinned = reference.specialist_sha256
    for name, files in pinned.items() if isinstance(pinned, dict) else [("", 0)]:
        hashes[f"specialist_sha256 of {name!r}"] = files
    for field_name, files in hashes.items():
        check_words(field_name, files)
        if odd := [name for name in files if name in (".", "..") or re.search(r"[/\\\0]", name)]:
            rule = "A reference recipe pins files of the folders that it names"
            raise refused(f"`{field_name}` names {odd[0]!r}", rule)
    if set(reference.specialist_sha256) != set(reference.specialists):
        raise refused(
            f"the recipe names {sorted(reference.specialists)} and pins files of {sorted(reference.specialist_sha256)}",
            "A reference recipe pins the files of every specialist",
        )
    for field_name in ("chat_template", "base"):
        value = getattr(reference, field_name)
        if not isinstance(value, str | None):
            fact = f"`{field_name}` of a reference recipe is {str(value)[:200]!r}"
            raise refused(fact, "It is a name", "Correct it.")
    return reference


def check_pinned(folder, read: list[str], pinned: dict[str, str]) -> None:
    """Rejects files that are read and not pinned.

    Raises:
        ValueError: Naming the first.
    """
    if loose := sorted(set(read) - set(pinned)):
        raise refused(
            f"the recipe does not pin {loose[0]!r} of {str(folder)!r}, of which it pins {sorted(pinned)}",
            "A reference recipe pins every file that is read",
            "Take that file away, or have the recipe written anew: `ultrafuser refer FUSED`.",
        )


def check_sha256(path: Path, expected: str) -> None:
    """Rejects a file that is not the one that was pinned.

    Raises:
        ValueError: Naming it.
    """
    if path.exists():
        check_file(path)
    found = sha256(path) if path.exists() else None
    if found != expected:
        is_other = f"has the SHA-256 {found} instead of {expected}" if found else "is not there"
        raise refused(
            f"{str(path)!r} {is_other}",
            "A reference recipe rebuilds a model from the very files that it was made from",
            "Fetch that file again; one from the Hub with `hf download --force-download`.",
        )


def sha256(path: Path) -> str:
    """Returns the digest of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return sha256_of(file)
