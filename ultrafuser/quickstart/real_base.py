"""The base of `quickstart --real`: a repository on the Hub, a folder or a GGUF file, checked before anything large is read."""

import importlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_ultrafuser.architecture_ultrafuser import backbone_class, empty_model
from modeling_ultrafuser.checkpoint_ultrafuser import empty_tensors
from modeling_ultrafuser.files_ultrafuser import in_words, read_json
from modeling_ultrafuser.gguf_ultrafuser import dequantised, gguf_arguments, is_gguf
from modeling_ultrafuser.lora_ultrafuser import CONFIG_FILE, WEIGHTS_FILE, adaptable, pairs
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.safetensors_ultrafuser import read_header
from modeling_ultrafuser.specialist_config_ultrafuser import own_config
from modeling_ultrafuser.tokenizer_ultrafuser import load_tokenizer

from ..atomic import new_folder
from ..check.metadata import SMALL, Source, read
from ..pretrained import load_model


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
DEFAULT = f"{MODEL}@{COMMIT}"
WAYS = f"Pass --base FOLDER, --base FILE.gguf or --base ID@COMMIT of {MODEL}, or leave --base out for that model on the Hub."
# names in `tokenizer.ggml.pre` of vocabularies whose merges were learned of single digits: llama.cpp splits text so for
# them, and transformers, which does not know them, as GPT-2 does
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}


def check_base(given: str, adapters: Mapping[str, Path]) -> Source:
    """Reads the small files of a base, and refuses one that the adapters do not fit or nobody can talk to.

    Args:
        given: A folder, a GGUF file, or ID@REVISION on the Hub.
        adapters: Folders of LoRA adapters by name.

    Raises:
        OSError: If it is not there.
        ValueError: If it is no base of these adapters, or has no tokenizer or chat template.
    """
    location, revision = given, None
    if "@" in given and not os.path.exists(given):
        location, _, revision = given.rpartition("@")
    try:
        source = read("base", location, revision)
        hub = {"revision": source.revision}
        config = own_config("base", source.location, **hub)
    except Refusal as error:
        rule = "The base is a folder, a GGUF file or a repository on the Hub"
        raise type(error)(error.fact, rule, f"{error.way_out} {WAYS}", about="base") from error
    check_adapters(given, config, adapters)
    if is_gguf(source.location):
        tokenizer = gguf_tokenizer(source.location)
    else:
        tokenizer = load_tokenizer(source.location, None, **hub)
    if tokenizer is None or not tokenizer.chat_template:
        lacks = "no tokenizer" if tokenizer is None else "a tokenizer without a chat template"
        raise Refusal(
            f"the base {given!r} has {lacks}",
            "The gate is fitted on conversations, which a chat template puts into words",
            WAYS,
            about="base",
        )
    return source


def check_adapters(given: str, config: PreTrainedConfig, adapters: Mapping[str, Path]) -> None:
    """Refuses a base whose layers are not those that the adapters are on.

    Raises:
        ValueError: Naming the first adapter that does not fit.
    """
    layers = adaptable(empty_model("base", config), backbone_class(config.get_text_config(decoder=True)))
    for name, folder in adapters.items():
        try:
            header = read_header(folder / WEIGHTS_FILE)
            pairs(name, read_json(folder / CONFIG_FILE), empty_tensors(header), layers)
        except Refusal as error:
            raise Refusal(
                f"{given!r} is not the base of the adapter {name!r}: {error.fact}",
                f"The specialists that come with this package are adapters of {MODEL}",
                WAYS,
                about="base",
            ) from error


def local_base(source: Source, out: Path) -> str:
    """Returns a folder of the base: that of the Hub's cache, the one that was given, or `out/base` made of a GGUF file."""
    if is_gguf(source.location):
        folder = out / "base"
        if not folder.exists():
            with new_folder(folder) as part:
                write_folder(source.location, part)
        return str(folder)
    if os.path.isdir(source.location):
        return source.location
    files = [*(source.weights or ()), *SMALL, "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"]
    return snapshot_download(source.location, revision=source.commit, allow_patterns=files)


def write_folder(file: str, folder: Path) -> None:
    """Writes the ordinary folder of a GGUF file: weights in float32, tokenizer, settings of generation, card."""
    place, gguf_file = gguf_arguments(file)
    with in_words("The base", file):
        tokenizer = gguf_tokenizer(file)
        model = load_model(place, **gguf_file, **dequantised(), dtype=torch.float32)
    # plain weights from here on, which the file's quantisation says nothing about
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    tokenizer.save_pretrained(folder)
    licence = gguf_words(file).get("general.license")
    card = f"---\nlicense: {licence}\n---\n" if licence else ""
    (folder / "README.md").write_text(f"{card}\nDequantised from `{os.path.basename(file)}`.\n", encoding="utf-8")
    model.save_pretrained(folder)


def gguf_tokenizer(file: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a GGUF file, or the one beside it, which encodes as the original does."""
    tokenizer = load_tokenizer(file)
    plain = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    if plain and gguf_words(file).get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        digits, bytes_ = (
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        )
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return tokenizer


@cache
def gguf_words(file: str) -> dict[str, str]:
    """Returns the words in the header of a GGUF file, by name; reading it takes seconds."""
    gguf = importlib.import_module("gguf")
    fields = gguf.GGUFReader(file).fields.items()
    return {name: field.contents() for name, field in fields if field.types[:1] == [gguf.GGUFValueType.STRING]}
