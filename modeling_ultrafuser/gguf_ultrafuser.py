"""Specialists in one GGUF file, as llama.cpp reads them: their weights are dequantised while they are read."""

import os

import transformers
from transformers.utils import is_gguf_available


def gguf_arguments(source) -> tuple[str, dict]:
    """Where to load a specialist from, and the arguments that say so.

    Args:
        source: Its Hub id or folder; or its GGUF file.

    Returns:
        What `from_pretrained` takes: the folder of a GGUF file and `gguf_file`; anything else as it is.
    """
    if not is_gguf(source):
        return source, {}
    folder, file = os.path.split(os.fspath(source))
    return folder or ".", {"gguf_file": file}


def is_gguf(source) -> bool:
    """Whether a specialist is given as a GGUF file."""
    return isinstance(source, str | os.PathLike) and os.fspath(source).lower().endswith(".gguf")


def check_gguf(name: str, source: str) -> None:
    """Refuses a GGUF file that is not there, or cannot be read here.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is none, or only a part of a model.
        ImportError: If the package that reads it is missing.
    """
    if not os.path.isfile(source):
        raise FileNotFoundError(
            f"A GGUF specialist is a file on this machine, but {source!r} of {name!r} is not there. Check the spelling; "
            f"fetch one from the Hub first: `hf download OWNER/NAME FILE.gguf --local-dir FOLDER`."
        )
    with open(source, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"A GGUF file begins with the letters GGUF, but {source!r} of {name!r} begins with {magic!r}. It is of another "
            f"format, or a broken download: fetch it again."
        )
    if not is_gguf_available():
        raise ImportError(
            f"{name!r} is the GGUF file {source!r}, which the package `gguf` reads, and it is not installed. Install it: "
            f'`pip install "ultrafuser[gguf]"`.'
        )


def dequantised() -> dict:
    """The argument of `from_pretrained` that makes plain weights of a GGUF file; some versions need none."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
