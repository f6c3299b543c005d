"""Reads a specialist's metadata: its small files, and the headers of its safetensors."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import (
    HfApi,
    errors,
    get_safetensors_metadata,
    get_token,
    hf_hub_download,
    parse_safetensors_file_metadata,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import SafetensorsFileMetadata

from modeling_ultrafuser.configuration_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, in_words, read_json
from modeling_ultrafuser.folder_ultrafuser import check_folder
from modeling_ultrafuser.gguf_ultrafuser import check_gguf, is_gguf
from modeling_ultrafuser.lora_ultrafuser import CONFIG_FILE, WEIGHTS_FILE
from modeling_ultrafuser.names_ultrafuser import validate_specialist_names
from modeling_ultrafuser.refusals_ultrafuser import Refusal, UnavailableError
from modeling_ultrafuser.safetensors_ultrafuser import checked_header, read_header, weight_files


# what a tokenizer is made from
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
ADDED = ("special_tokens_map.json", "added_tokens.json")
# what is read whole; every file is some kilobytes
SMALL = (
    *("config.json", "generation_config.json", "adapter_config.json", "README.md"),
    *("tokenizer_config.json", *ADDED, "chat_template.jinja"),
)


@dataclass
class Source:
    """A specialist as it can be read without its weights.

    Attributes:
        location: Its folder, or its id on the Hub; offline, the folder in its cache.
        folder: Where its small files are on this machine.
        commit: Of its repository that was read; None for a folder.
        gated: Whether the Hub asks for its terms to be accepted.
        sizes: Of its files in bytes, by name.
        hashes: Of the contents of its files, by name; empty for a folder.
        weights: Of each of its safetensors files, type and shape of each tensor; None if they could not be read.
        problem: Why they could not.
    """

    location: str
    folder: Path
    commit: str | None = None
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    weights: dict[str, dict[str, tuple[str, tuple[int, ...]]]] | None = None
    problem: str | None = None

    @property
    def adapter(self) -> dict | None:
        """The configuration of the adapter that it is; None if it is a whole model."""
        if CONFIG_FILE not in self.sizes or "config.json" in self.sizes:
            return None
        return read_json(self.folder / CONFIG_FILE)

    @property
    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each tensor of all its files."""
        return {key: about for tensors in (self.weights or {}).values() for key, about in tensors.items()}

    @property
    def revision(self) -> str:
        """Returns the revision to read, so that everything is of one commit."""
        return self.commit or "main"

    @property
    def download(self) -> int:
        """Bytes of weights that are still to be downloaded."""
        if not self.hashes or self.weights is None:
            return 0
        cached = (try_to_load_from_cache(self.location, f, revision=self.commit) for f in self.weights)
        pairs = zip(self.weights, cached, strict=True)
        return sum(self.sizes.get(file, 0) for file, path in pairs if not isinstance(path, str))


def parse(texts: list[str]) -> dict[str, tuple[str, str | None]]:
    """Names and where to read: from "ID", "ID@REVISION", "FOLDER", each with or without "NAME=" in front.

    Returns:
        Name to location and revision.

    Raises:
        ValueError: If a name cannot be a specialist's.
    """
    found = {}
    for text in texts:
        given = re.fullmatch(r"(\w+)=(.+)", text) if not os.path.exists(text) else None
        location, revision = given[2] if given else text, None
        if "@" in location and not os.path.exists(location):
            location, _, revision = location.rpartition("@")
        name = given[1] if given else _name(location)
        if name in found and not given:
            name = next(n for k in range(2, len(texts) + 1) if (n := f"{name}_{k}") not in found)
        validate_specialist_names([*found, name], UltraFuserConfig)
        found[name] = (location, revision)
    return found


def _name(location: str) -> str:
    """A name that a specialist can have, from the last part of its folder or id."""
    name = re.sub(r"\W+", "_", Path(location).resolve().name, flags=re.ASCII).strip("_")
    try:
        validate_specialist_names([name], UltraFuserConfig)
    except ValueError:
        return f"model_{name}"
    return name


def read(name: str, location: str, revision: str | None = None) -> Source:
    """Reads a specialist's small files and the headers of its weights.

    Args:
        name: Of the specialist.
        location: Its folder, or its id on the Hub.
        revision: Branch, tag or commit on the Hub. Default: its main branch.

    Raises:
        OSError: If there is nothing, or it may not be read.
        ValueError: If it is a file.
    """
    if is_gguf(location):
        check_gguf(name, location)
        file = Path(location)
        return Source(location, file.parent, sizes={file.name: file.stat().st_size})
    if os.path.isfile(location):
        raise Refusal(
            f"{name!r} is the file {location!r}",
            "A specialist is a folder or a Hub id",
            "Pass the folder that holds it.",
            about="access",
        )
    if os.path.isdir(location):
        return _read_folder(location, Path(location))
    try:
        return _read_hub(location, revision)
    except errors.HfHubHTTPError as error:
        raise _denied(name, location, revision, error) from error
    except errors.HFValidationError as error:
        rule = "A specialist is a folder or a repository on the Hub, OWNER/NAME"
        raise UnavailableError(
            f"{name!r} ({location!r}) is no folder here", rule, "Check the spelling.", about="access"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ValueError) as error:
        # not online: what has been downloaded is read instead
        try:
            folder = Path(snapshot_download(location, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            raise _denied(name, location, revision, error) from error
        source = _read_folder(str(folder), folder)
        source.commit = folder.name
        return source


def _read_folder(location: str, folder: Path) -> Source:
    check_folder(folder)
    source = Source(location, folder)
    source.sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}

    def headers() -> dict:
        if source.adapter is not None:
            return {WEIGHTS_FILE: read_header(folder / WEIGHTS_FILE)}
        return {os.path.basename(path): read_header(path) for path in weight_files(folder) or ()}

    _read_weights(source, headers)
    return source


def _read_hub(location: str, revision: str | None) -> Source:
    info = HfApi().model_info(location, revision=revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings}
    small = [hf_hub_download(location, file, revision=info.sha) for file in SMALL if file in files]
    source = Source(location, Path(small[0]).parent if small else Path(), info.sha, bool(info.gated))
    if small:
        check_folder(source.folder)
    source.sizes = {file: about.size for file, about in files.items()}
    # a large file's blob is a pointer, which says less than its own hash
    source.hashes = {file: about.lfs.sha256 if about.lfs else about.blob_id for file, about in files.items()}

    def headers() -> dict:
        if source.adapter is not None:
            return {WEIGHTS_FILE: checked(parse_safetensors_file_metadata(location, WEIGHTS_FILE, revision=info.sha))}
        found = get_safetensors_metadata(location, revision=info.sha).files_metadata
        return {file: checked(about, file) for file, about in found.items()}

    def checked(about: SafetensorsFileMetadata, file: str = WEIGHTS_FILE) -> dict:
        tensors, end = checked_header({key: vars(tensor) for key, tensor in about.tensors.items()}, file)
        if source.sizes.get(file, end) < end:
            fact = f"{file!r} has {source.sizes[file]} bytes of more than {end}: a broken download"
            raise UnreadableFileError(fact)
        return tensors

    _read_weights(source, headers)
    return source


def _read_weights(source: Source, headers) -> None:
    try:
        with in_words("The weights", source.location):
            source.weights = headers() or None
    except errors.NotASafetensorsRepoError:
        pass
    except (OSError, UnreadableFileError) as error:
        reason = error.fact if isinstance(error, Refusal) else str(error).splitlines()[0]
        source.problem = f"it is not whole ({reason})"
        return
    if source.weights is None:
        found = sorted(f for f in source.sizes if f.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))[:3]
        source.problem = f"it holds no model.safetensors, only {found}" if found else "it holds no weights"


def _denied(name: str, location: str, revision: str | None, error: Exception) -> UnavailableError:
    token = "a token was found" if get_token() else "no token was found"
    where = f"{name!r} ({location!r}{f', revision {revision!r}' if revision else ''})"
    rule = "A specialist is a folder or a repository on the Hub"
    if isinstance(error, errors.GatedRepoError):
        fact, rule = f"{where} is gated, and {token}", "A specialist's files must be readable"
        way_out = "Accept its terms on its page on the Hub with your account, then run `hf auth login`; or pass a local folder."
    elif isinstance(error, errors.RevisionNotFoundError):
        fact, rule = f"{where} has no such revision", "A specialist is read at one commit"
        way_out = "Check the spelling."
    elif isinstance(error, errors.RepositoryNotFoundError):
        fact = f"{where} is no folder here and no repository on the Hub, or it is private, and {token}"
        way_out = "Check the spelling; for a private one run `hf auth login`."
    else:
        fact = (
            f"{where} is no folder here, and the Hub cannot be asked: {str(error).splitlines()[0].removesuffix('.')}"
        )
        way_out = "Check the spelling; offline, pass a local folder."
    return UnavailableError(fact, rule, way_out, about="access")
