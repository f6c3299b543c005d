"""Models and tokenizers from folders and the Hub, without running code that comes with them.

A fused model loads with this package's own code, whatever lies in its folder. Code of other models and tokenizers is run
only where the user asked for it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# so that fused models load with this package's code
import modeling_ultrafuser  # noqa: F401
from modeling_ultrafuser.files_ultrafuser import in_words
from modeling_ultrafuser.folder_ultrafuser import check_folder
from modeling_ultrafuser.tokenizer_ultrafuser import without_code


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
    return tokenizer if trust_remote_code else without_code(tokenizer)


def _load(load: Callable, source: str | Path, trust_remote_code: bool, settings: dict):
    if os.path.isdir(source):
        check_folder(source)
    with in_words("The model or tokenizer", source), refusing_code(source):
        # not None, which asks on the standard input, where a prompt that is piped in may say yes
        return load(source, trust_remote_code=trust_remote_code, **settings)


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
