"""Private parts of transformers and huggingface_hub that the commands rely on, each behind a name of its own.

Seen in transformers 5.23, huggingface_hub 2.4, torch 2.13, torchao 0.18 and bitsandbytes 0.50. `tests/contracts/` holds a
test of each. Imports nothing large, as every command reads it.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO


if TYPE_CHECKING:
    from transformers import CompileConfig, PreTrainedConfig


# what packages say of themselves whenever transformers and PEFT import them, by the logger that says it: kernels that are
# built for another machine are left out, and whoever calls one is told then
_ON_IMPORT = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ON_IMPORT[record.name])


def hide_import_warnings() -> None:
    """Hides what torchao, bitsandbytes and torch say of torchao whenever they are imported, and nothing else of theirs."""
    for name in _ON_IMPORT:
        logging.getLogger(name).addFilter(_is_news)


def compile_on_any_device(config: "CompileConfig") -> None:
    """Lets `generate` compile on a CPU, too (`_compile_all_devices`): it does so on GPUs only."""
    config._compile_all_devices = True


def attention_as_llama(config: "PreTrainedConfig") -> Callable:
    """Returns the function by which Llamas attend: (module, queries, keys, values, mask, scaling) to (output, weights)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)


def cancel(manager, request_id: str) -> None:
    """Takes a request out of continuous batching. `CBGenerateManager` does so itself for streamed answers alone."""
    manager._cb.cancel_request(request_id)


def messages_and_tools(handler, body: dict) -> tuple[list[dict], list[dict] | None]:
    """Returns a request to /v1/responses in the form of chat completions, as `ResponseHandler` reads it."""
    return handler._normalize_input(body), handler._normalize_tools(body.get("tools"))


def sha256_of(file: BinaryIO) -> str:
    """Returns the SHA-256 of an open file in hexadecimal digits, read a part at a time."""
    from huggingface_hub.utils.sha import sha_fileobj

    return sha_fileobj(file).hex()


def yaml_of_card(text: str) -> str | None:
    """Returns the metadata at the head of a model card, which may be malformed, or None if there is none."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    return block[2] if block else None
