"""Models and tokenizers from folders and the Hub, without running code that comes with them; and fused models' folders.

A fused model loads with this package's own code, whatever lies in its folder. Code of other models and tokenizers is run
only where the user asked for it.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# importing it makes fused models load with this package's code
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, tokenizer_ultrafuser
from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, in_words, read_json
from modeling_ultrafuser.folder_ultrafuser import check_folder
from modeling_ultrafuser.refusals_ultrafuser import Refusal, UnavailableError
from trainers.template_sandbox import RenderingError, render_chat


INGREDIENTS = "specialists.json"


def load_config(source: str | Path, *, trust_remote_code: bool = False, **hub):
    """A model's configuration."""
    return _load(AutoConfig.from_pretrained, source, trust_remote_code, hub)


def load_model(source: str | Path, *, trust_remote_code: bool = False, **settings) -> PreTrainedModel:
    """A causal language model.

    Raises:
        ValueError: If it comes with code of its own, which was not asked for.
    """
    return _load(AutoModelForCausalLM.from_pretrained, source, trust_remote_code, settings)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False, **settings) -> PreTrainedTokenizerBase:
    """A tokenizer.

    Raises:
        ValueError: If it comes with code of its own, which was not asked for.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, source, trust_remote_code, settings)
    return tokenizer if trust_remote_code else tokenizer_ultrafuser.without_code(tokenizer)


def _load(load: Callable, source: str | Path, trust_remote_code: bool, settings: dict):
    if os.path.isdir(source):
        check_folder(source)
    with in_words("The model or tokenizer", source), refusing_code(source), _naming(source):
        # not None, which asks on the standard input, where a prompt that is piped in may say yes
        return load(source, trust_remote_code=trust_remote_code, **settings)


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Says in our words that there is neither a folder nor a repository of that name."""
    try:
        yield
    except OSError as error:
        # of what is there a file may be missing, which transformers names
        if isinstance(error.__cause__, RepositoryNotFoundError | HFValidationError):
            raise _nowhere(source) from error
        raise


@contextmanager
def refusing_code(source: str | Path) -> Iterator[None]:
    """Says in our words that code of a folder was not run."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(
            f"Code that comes with a model or tokenizer is not run unasked, because it can do anything, but "
            f"{str(source)!r} needs its own. Read it; then `data look`, `data clean` and `bench` run it with --trust-remote-code, "
            f"and other commands never. Or take a model of an architecture that transformers has."
        ) from error


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Says in words what fails while a model answers as its files say: many settings are first read then.

    Raises:
        ValueError: In place of whatever a library raises, but for too little memory.
    """
    with in_words("What generation_config.json or config.json asks of an answer", model.name_or_path):
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(f"An answer of this model needs more memory than there is: {error}") from error


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
        raise _nowhere(source) from error


def _nowhere(source: str | Path) -> UnavailableError:
    fact = f"there is no model at {str(source)!r}: neither such a folder nor such an id on the Hub"
    return UnavailableError(fact, "", "Check the spelling; for a private one run `hf auth login`.")


def check_there(source: str, revision: str | None = None) -> None:
    """Rejects a model that is neither a folder nor on the Hub, before anything else is read.

    Raises:
        OSError: If it is not there.
    """
    if os.path.isdir(source):
        return
    try:
        with _naming(source):
            PreTrainedConfig.get_config_dict(source, revision=revision)
    except UnavailableError:
        raise
    except OSError:
        # an adapter has no such file, which is no fault of it
        return


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
    tokenizer = tokenizer_ultrafuser.load_tokenizer(folder)
    if tokenizer is None:
        raise Refusal(
            f"{str(folder)!r} holds no tokenizer",
            "A fused model comes with its own",
            f"Save that of a specialist there: `common_tokenizer(specialists).save_pretrained({str(folder)!r})`.",
            about="tokenizer",
        )
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Encodes a conversation, or without a chat template its last message as plain text. Shape (1, seq).

    Raises:
        ValueError: If the template cannot render it.
    """
    if tokenizer.chat_template is None:
        return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    try:
        text = render_chat(tokenizer, messages)
    except RenderingError as error:
        raise ValueError(f"The model's chat template cannot render this conversation: {error}.") from error
    read = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not read.shape[-1]:
        raise ValueError("The model's chat template renders nothing of this conversation.")
    return read


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


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the tokenizer of an ordinary model so that transformers 4, which llama.cpp's converter asks for, reads it too.

    Both versions read the older names as the same tokenizer.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
