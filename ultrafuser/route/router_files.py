"""Routers as folders, and by name: `router.json` and `router.safetensors`, which hold no code."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, in_words, read_json
from modeling_ultrafuser.refusals_ultrafuser import Refusal

from . import ROUTERS
from .router_base import Router


ABOUT, TENSORS = "router.json", "router.safetensors"


def router_named(word: str, *, trained: bool = False) -> tuple[type[Router], dict]:
    """Finds a kind of router by its name, and reads its setting.

    Args:
        word: A name in `ROUTERS`; a colon and its setting, if it has one.
        trained: Whether it must be one that is trained.

    Raises:
        ValueError: If there is no such router, or it has no such setting.
    """
    name, colon, setting = word.partition(":")
    names = [n for n, kind in ROUTERS.items() if kind.trains == trained]
    if name not in names:
        rule = "A router that is trained is one of" if trained else "A router without training is one of"
        more = "" if trained else ", and others are folders that `ultrafuser route` wrote"
        raise Refusal(
            f"There is no such router: {word!r:.100}", f"{rule} {names}{more}", "Choose another.", about="router"
        )
    return ROUTERS[name], ROUTERS[name].parse(setting if colon else None)


def save_router(folder: Path, kind: str, router: Router, specialists: list[str]) -> None:
    """Writes a router into a folder that is there.

    Args:
        folder: Where to write.
        kind: Its name in `ROUTERS`.
        router: What is saved.
        specialists: Names of those it chooses among.
    """
    save_file({name: tensor.contiguous() for name, tensor in router.tensors.items()}, folder / TENSORS)
    about = {"kind": kind, "specialists": specialists, "settings": router.settings}
    (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def load_router(source: str | Path, specialists: list[str]) -> Router:
    """Returns the router in a folder, or one without training by its name, such as "perplexity:0.5".

    Args:
        source: The folder, or the name.
        specialists: Names of those to choose among.

    Raises:
        ValueError: If there is none, or it chooses among others.
    """
    file = Path(source) / ABOUT
    if not file.exists():
        kind, settings = router_named(str(source))
        return kind(settings)
    about = read_json(file)
    if about.get("kind") not in ROUTERS or not isinstance(about.get("settings"), dict):
        raise UnreadableFileError(
            f"{str(file)!r} holds a router of the kind {str(about.get('kind'))[:100]!r}",
            f"Kinds are {list(ROUTERS)}",
            "Train it again: `ultrafuser route`.",
        )
    if about.get("specialists") != specialists:
        raise Refusal(
            f"{str(source)!r} chooses among {about.get('specialists')}, but the model has {specialists}",
            "A router is of the specialists that it was trained for, in their order",
            "Train one for this model: `ultrafuser route`.",
            about="router",
        )
    with in_words("The router", file.parent):
        return ROUTERS[about["kind"]](about["settings"], load_file(file.with_name(TENSORS)))
