"""Folders of fused models: written whole or not at all, and what they say of where their specialists come from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from modeling_ultrafuser import UltraFuserConfig


INGREDIENTS = "specialists.json"
LOCK = ".lock"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` at the end, in one step.

    Whatever an earlier run left in it when it was killed is deleted first. Write the weights last, and what is
    left there does not load either.

    Args:
        out: The folder that there will be. It may be there if it is empty.

    Yields:
        `OUT.part`, empty.

    Raises:
        FileExistsError: If there is something in `out`, or another process is writing it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"Nothing is overwritten unasked, but {str(out)!r} is there and not empty. Choose another folder, or move "
            f"it away."
        )
    out = out.absolute()
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part / LOCK, timeout=0)  # a killed process holds none
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"One process at a time writes a folder, but another one is writing {str(out)!r}. Wait for it."
        ) from None
    try:
        _empty(part)
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    else:
        (part / LOCK).unlink()
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        lock.release()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def fused_config(folder: str | Path) -> UltraFuserConfig:
    """The configuration of a fused model's folder.

    Raises:
        ValueError: If it holds no model, or one of another kind.
    """
    file = Path(folder) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.exists() else None
    if kind != UltraFuserConfig.model_type:
        raise ValueError(
            f"This is for a fused model's folder, as `ultrafuser fuse` writes it, but {str(folder)!r} holds "
            f"{'no config.json' if not file.exists() else f'a model of type {kind!r}'}."
        )
    return UltraFuserConfig.from_pretrained(folder)


def read_ingredients(folder: Path) -> dict[str, dict]:
    """What a folder says of where its specialists come from, by name; empty if it says nothing."""
    path = folder / INGREDIENTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_ingredients(folder: Path, ingredients: dict[str, dict]) -> None:
    """Writes beside a model where its specialists come from, if that is known of any."""
    if ingredients:
        (folder / INGREDIENTS).write_text(json.dumps(ingredients, indent=2) + "\n", encoding="utf-8")


def save_fused(folder: Path, model, tokenizer, ingredients: dict[str, dict]) -> None:
    """Writes a fused model with its tokenizer, and where its specialists come from; the weights last."""
    tokenizer.save_pretrained(folder)
    write_ingredients(folder, ingredients)
    model.save_pretrained(folder)
