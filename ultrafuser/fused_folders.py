"""Folders of fused models, and what they say of where their specialists come from."""

import json
import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, in_words, read_json
from modeling_ultrafuser.folder_ultrafuser import check_folder
from modeling_ultrafuser.refusals_ultrafuser import Refusal, UnavailableError
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer

from .pretrained import load_config, refusing_code


INGREDIENTS = "specialists.json"


def fused_config(source: str | Path) -> UltraFuserConfig:
    """Returns the configuration of a fused model.

    Args:
        source: Its folder, or its id on the Hub.

    Raises:
        OSError: If there is no model.
        ValueError: If it is a model of another kind.
    """
    kind = _type_in(Path(source)) if os.path.isdir(source) else _type_at(source)
    if kind != UltraFuserConfig.model_type:
        held = "no config.json" if kind is None else f"a model of type {kind!r}"
        way_out = "Pass a folder that `ultrafuser fuse` wrote."
        raise Refusal(f"{str(source)!r} holds {held}", "This is for a fused model", way_out)
    with in_words("The fused model's configuration", source):
        return UltraFuserConfig.from_pretrained(source)


def _type_in(folder: Path) -> str | None:
    if not (folder / "config.json").exists():
        return None
    check_folder(folder)
    return read_json(folder / "config.json").get("model_type")


def _type_at(source: str) -> str:
    try:
        return load_config(source).model_type
    except OSError as error:
        fact = f"there is no model at {str(source)!r}: neither such a folder nor such an id on the Hub"
        way_out = "Check the spelling; for a private one run `hf auth login`."
        raise UnavailableError(fact, "", way_out) from error


def open_fused(source: str | Path, **settings) -> tuple[UltraFuserForCausalLM, PreTrainedTokenizerBase]:
    """Returns a fused model, on the GPU if there is one, and its tokenizer.

    Args:
        source: Its folder, or its id on the Hub.
        settings: Of `from_pretrained`. With a `device_map` the model is where that says.

    Raises:
        OSError: If there is no model.
        ValueError: If it is a model of another kind, or has no tokenizer.
    """
    fused_config(source)
    with refusing_code(source):
        tokenizer = read_tokenizer(source)
    model = UltraFuserForCausalLM.from_pretrained(source, **settings).eval()
    if "device_map" not in settings:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in a model's folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise Refusal(
            f"{str(folder)!r} holds no tokenizer",
            "A fused model comes with its own",
            f"Save that of a specialist there: `common_tokenizer(specialists).save_pretrained({str(folder)!r})`.",
            about="tokenizer",
        )
    return tokenizer


def read_ingredients(folder: Path) -> dict[str, dict]:
    """Reads the origins of a folder's specialists, by name; empty if it has none."""
    path = folder / INGREDIENTS
    found = read_json(path) if path.exists() else {}
    for name, about in found.items():
        if not isinstance(about, dict) or not all(isinstance(value, str | None) for value in about.values()):
            fact = f"{str(path)!r} tells of {name!r} {str(about)[:200]!r}"
            rule = "It tells of each specialist where it comes from"
            raise UnreadableFileError(fact, rule, "Correct it, or move it away.")
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
