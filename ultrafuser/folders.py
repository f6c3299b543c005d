"""Folders of fused models, and what they say of where their specialists come from."""

import json
from pathlib import Path

from modeling_ultrafuser import UltraFuserConfig


INGREDIENTS = "specialists.json"


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
