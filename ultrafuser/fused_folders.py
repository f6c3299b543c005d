"""Folders of fused models, and what they say of where their specialists come from."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, in_words, read_json
from modeling_ultrafuser.folder_ultrafuser import check_folder
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer


INGREDIENTS = "specialists.json"


def fused_config(folder: str | Path) -> UltraFuserConfig:
    """The configuration of a fused model's folder.

    Raises:
        ValueError: If it holds no model, or one of another kind.
    """
    file = Path(folder) / "config.json"
    if file.exists():
        check_folder(folder)
    kind = read_json(file).get("model_type") if file.exists() else None
    if kind != UltraFuserConfig.model_type:
        raise ValueError(
            f"This is for a fused model's folder, as `ultrafuser fuse` writes it, but {str(folder)!r} holds "
            f"{'no config.json' if not file.exists() else f'a model of type {kind!r}'}."
        )
    with in_words("The fused model's configuration", folder):
        return UltraFuserConfig.from_pretrained(folder)


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(
            f"A fused model comes with its tokenizer, but {str(folder)!r} holds none. Save it there: "
            f"`tokenizer.save_pretrained({str(folder)!r})`."
        )
    return tokenizer


def read_ingredients(folder: Path) -> dict[str, dict]:
    """What a folder says of where its specialists come from, by name; empty if it says nothing."""
    path = folder / INGREDIENTS
    found = read_json(path) if path.exists() else {}
    for name, about in found.items():
        if not isinstance(about, dict) or not all(isinstance(value, str | None) for value in about.values()):
            raise UnreadableFileError(
                f"{str(path)!r} says of each specialist where it comes from, but of {name!r} it says {str(about)[:200]!r}. "
                f"Correct it, or move it away."
            )
    return found


def write_ingredients(folder: Path, ingredients: dict[str, dict]) -> None:
    """Writes beside a model where its specialists come from, if that is known of any."""
    if ingredients:
        (folder / INGREDIENTS).write_text(json.dumps(ingredients, indent=2) + "\n", encoding="utf-8")


def save_fused(folder: Path, model, tokenizer, ingredients: dict[str, dict]) -> None:
    """Writes a fused model with its tokenizer, and where its specialists come from; the weights last."""
    tokenizer.save_pretrained(folder)
    write_ingredients(folder, ingredients)
    model.save_pretrained(folder)
