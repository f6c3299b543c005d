"""A fused folder to the Hub: looked through, weighed, and seen by others in one commit or not at all."""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, metadata_load
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo
from rich.filesize import decimal
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.files_ultrafuser import UnreadableFileError
from modeling_ultrafuser.safetensors_ultrafuser import read_index

from .. import licences
from ..keys import SECRET
from ..pretrained import INGREDIENTS, fused_config, load_tokenizer
from . import model_card


WEIGHTS, INDEX, CARD = "model.safetensors", "model.safetensors.index.json", "README.md"
# what transformers reads beside weights and code; of an earlier model on the Hub, none of it may stay
READ = (
    *("config.json", "generation_config.json", "specialists.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model"),
)
# what the Hub says of an earlier model's scores must not stay, either
SCORES = (f"{EVAL_RESULTS_FOLDER}/*.yaml",)
FOR_PEOPLE = (CARD, "LICENSE*", "NOTICE*", *SCORES)
ASK_ABOVE = 1e9  # bytes


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    say: Callable[[str], None] = print,
    agree: Callable[[], bool] = lambda: True,
) -> str | None:
    """Uploads a fused model with its code, tokenizer and card, after saying how large it is and who will see it.

    Everything becomes visible in one commit, after all content has been uploaded: killed at any time, the repository
    holds what it held before. Run again, content that the Hub has is not sent again.

    Args:
        folder: Of the fused model. Gets a card if it has none.
        repo_id: "owner/name" on the Hub; made if it is not there.
        private: Whether only its owner sees it, if it is made. Default: only its owner does, and one that is there
            stays as it is.
        revision: Branch to push to; made if it is not there. Default: main.
        token: Of the Hub. Default: that of whoever is logged in.
        say: Called with a line about each thing that a user should know first.
        agree: Asked before much is sent, or files of an earlier model go. Nothing is sent unless it says yes.

    Returns:
        Address of the commit, or None if nothing was sent.

    Raises:
        ValueError: If the folder is not a whole fused model, or would give away a secret; if nobody is logged in; or
            if the repository is there for all to see, but is to be private.
        OSError: If the Hub cannot be asked, or refuses.
    """
    check_token(token)
    files = whole_model(folder)
    api = HfApi(token=token) if token else HfApi()
    there = _there(api, repo_id, revision)
    if private and there and not there.private:
        raise ValueError(
            f"The model is to be private, but {repo_id!r} is there already, for all to see. Push to another, or "
            f"change its visibility on the Hub."
        )
    if CARD not in files:
        model_card.write_card(folder, repo=repo_id)
        say(f"{str(folder)!r} had no card, so one was written: {CARD}. `ultrafuser card` puts results into it.")
        files.append(CARD)
    elif "generated_from_trainer" in ((metadata_load(folder / CARD) or {}).get("tags") or ()):
        say(
            f"Warning: {CARD} is a trainer's, and silent on specialists and licences. "
            f"`ultrafuser card --overwrite` writes ours."
        )
    for warning in licences.warnings(model_card.read_licences(folder, fused_config(folder).specialist_names)):
        say(f"Warning: {warning}")
    old = [f.rfilename for f in there.siblings] if there else []
    stale = [f for f in old if _matches(f, (*READ, *SCORES, "*.safetensors", INDEX)) and f not in files]
    size = sum((folder / file).stat().st_size for file in files)
    hidden = there.private if there else private is not False
    seen = "private" if hidden else "public"
    say(f"{len(files)} files, {decimal(size)}, to the {seen} model {repo_id!r}, in one commit.")
    if left := sorted(p.name for p in folder.iterdir() if not any(f.split("/")[0] == p.name for f in files)):
        say(f"Not sent: {', '.join(left)}.")
    if stale:
        say(f"Of the model that is there now, these go; its history keeps them: {', '.join(stale)}.")
    if (size > ASK_ABOVE or stale) and not agree():
        return None
    api.create_repo(repo_id, private=hidden, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # not `upload_folder`, which may make several commits, so that a kill could leave some of the files
    commit = api.create_commit(
        repo_id,
        [*(CommitOperationDelete(f) for f in stale), *(CommitOperationAdd(f, _content(folder / f)) for f in files)],
        commit_message="A fused model: weights, code, tokenizer and card",
        revision=revision,
        # what goes was found at this commit
        parent_commit=there.sha if there else None,
    )
    return str(commit.commit_url)


def check_token(token: str | None) -> None:
    """Rejects a push by nobody.

    Raises:
        ValueError: If no token is given, and nobody is logged in.
    """
    if (token or get_token()) is None:
        raise ValueError(
            "Only somebody whom the Hub knows may push, but no token was found. Run `hf auth login`, or set HF_TOKEN."
        )


def whole_model(folder: Path) -> list[str]:
    """Files of a fused model to be sent, after a look whether it is whole: weights, code, tokenizer, and what is said.

    Reads the weights' headers only.

    Raises:
        ValueError: If something is missing, cut off, a pickle, or holds a secret.
    """
    fused_config(folder)
    code, weights = _code(folder), _weights(folder)
    try:
        _, found = UltraFuserForCausalLM.from_pretrained(folder, device_map="meta", output_loading_info=True)
    except (UnreadableFileError, OSError) as error:
        raise ValueError(
            f"Only a whole model is pushed, but the weights in {str(folder)!r} cannot be read: {error}. Save it again."
        ) from error
    if odd := {kind: sorted(map(str, keys))[:3] for kind, keys in found.items() if keys}:
        raise ValueError(f"Only a whole model is pushed, but of the weights in {str(folder)!r} some are odd: {odd}.")
    try:
        load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"A model is pushed with its tokenizer, but {str(folder)!r} holds none that loads. Save it there: "
            f"`tokenizer.save_pretrained({str(folder)!r})`."
        ) from error
    present = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    rest = sorted(f for f in present if _matches(f, (*READ, *FOR_PEOPLE)))
    for file in (*weights, *code, *rest):
        _check_within(folder, file)
        if found := SECRET.search(_words(folder / file)):
            raise ValueError(
                f"Secrets are not for the Hub, but {str(folder / file)!r} holds what looks like one: "
                f"{found[0][:6].decode()}... Take it out, and make a new one."
            )
    return [*weights, *code, *rest]


def _code(folder: Path) -> list[str]:
    """The files that the configuration names as the model's code, and what they import."""
    named = {}
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            given = json.loads((folder / file).read_text(encoding="utf-8")).get("auto_map") or {}
            _check_references(given, folder / file)
            named |= given if file == "config.json" and isinstance(given, dict) else {}
    missing = {"AutoConfig", "AutoModelForCausalLM"} - {name for name, value in named.items() if value}
    found = {f"{reference.split('.')[0]}.py" for reference in _references(named)}
    try:
        for file in list(found):
            found |= {Path(path).name for path in get_relative_import_files(folder / file)}
        missing |= {file for file in found if not (folder / file).exists()}
    except FileNotFoundError as error:
        missing.add(Path(error.filename).name)
    if missing:
        raise ValueError(
            f"A model is pushed with the code that others load it with, but {str(folder)!r} lacks {sorted(missing)}. "
            f"Load it and save it again, which writes them."
        )
    return sorted(found)


def _check_references(auto_map, file: Path) -> None:
    """Refuses code that is not a file of the folder."""
    for reference in _references(auto_map):
        if not isinstance(reference, str) or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", reference, re.ASCII):
            raise ValueError(
                f"A model's code lies beside it and is named as `module.Class`, so that nothing of elsewhere is sent or "
                f"run, but `auto_map` in {str(file)!r} has {reference!r}. Load the model and save it again."
            )


def _references(auto_map) -> list:
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return [r for value in values for r in (value if isinstance(value, list) else [value]) if r]


def _check_within(folder: Path, file: str) -> None:
    """Refuses a file that is a link, or lies behind one, to somewhere else."""
    real = (folder / file).resolve()
    if not real.is_relative_to(folder.resolve()) or not real.is_file():
        raise ValueError(
            f"Only what is in the folder is sent, but {str(folder / file)!r} is a link to {str(real)!r}. Put a copy in "
            f"its place if it is for others to see, or remove it."
        )


def _words(path: Path) -> bytes:
    """Returns the part of a file that may be text: of weights, the header."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _content(path: Path) -> Path | bytes:
    """Returns a file's content as it is sent, without the paths of specialists on this machine."""
    if path.name != INGREDIENTS:
        return path
    text = path.read_text(encoding="utf-8")
    for record in json.loads(text).values():
        source = str(record.get("source") or "")
        if not record.get("commit") and source:
            text = text.replace(json.dumps(source)[1:-1], json.dumps(Path(source).name)[1:-1])
    return text.encode()


def _weights(folder: Path) -> list[str]:
    """The files that loading reads: one, or those that the index names."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        raise ValueError(
            f"Weights are pushed as safetensors, because a pickle can run code where it is loaded, but "
            f"{str(folder)!r} holds {f'only {pickles}' if pickles else 'no weights'}. Load it and save it again."
        )
    shards = set(read_index(folder / INDEX).values())
    if missing := sorted(shard for shard in shards if not (folder / shard).exists()):
        raise ValueError(f"Only a whole model is pushed, but {str(folder)!r} lacks {missing}. Save it again.")
    return [INDEX, *sorted(shards)]


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    # a pattern without a folder is for the top one
    return any(fnmatch(file, p) and file.count("/") == p.count("/") for p in patterns)


def _there(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo | None:
    """Lists the files on the Hub at the revision, or at main, from which a new branch starts; None if there are none."""
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
