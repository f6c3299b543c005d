"""Reads the configuration of a specialist, or rejects what is no specialist."""

import copy
import os

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .checkpoint_ultrafuser import is_plain
from .configuration_ultrafuser import UltraFuserConfig
from .files_ultrafuser import file_or_none, in_words, read_json
from .folder_ultrafuser import check_folder
from .gguf_ultrafuser import check_gguf, gguf_arguments, is_gguf
from .refusals_ultrafuser import Refusal, UnavailableError


def own_config(name: str, source, **hub) -> PreTrainedConfig:
    """The specialist's configuration, or a sentence saying why this is no specialist."""
    if isinstance(source, PreTrainedModel):
        # one that was read from a quantised file may be plain since
        weights = (*source.parameters(), *(b for b in source.buffers() if b.ndim > 1))
        if getattr(source, "hf_quantizer", None) is not None and not all(map(is_plain, weights)):
            raise _quantised(name, "a quantised model in memory", getattr(source.config, "quantization_config", None))
        if source.config.model_type == UltraFuserConfig.model_type:
            raise _already_fused(name, source.config.specialist_names)
        if any(type(module).__module__.startswith("peft.") for module in source.modules()):
            raise Refusal(
                f"{name!r} ({type(source).__name__}) has an adapter of PEFT on its layers",
                "A specialist in memory is a plain model",
                "Save the adapter, `save_pretrained(FOLDER)`, and pass that folder, because LoRA adapters of one "
                "base are fused from their folders; or merge it, `merge_and_unload()` of a PEFT model, or take "
                "it off, `delete_adapter(...)`.",
            )
        config = copy.deepcopy(source.config)
        config.__dict__.pop("quantization_config", None)
        return config
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"A specialist is a Hub id, a local folder or a transformers model, but {name!r} is a "
            f"{type(source).__name__}. A PEFT model must be merged first, `model.merge_and_unload()`; or saved, because "
            f"LoRA adapters of one base are fused from their folders."
        )
    source = os.fspath(source)
    if is_gguf(source):
        return _gguf_config(name, source)
    if os.path.isfile(source):
        raise Refusal(
            f"{name!r} is the file {source!r}",
            "A specialist is a folder or a Hub id",
            "Pass the folder that holds it; of files alone GGUF is read.",
        )
    try:
        found = cached_file(source, "config.json", **hub)
    except OSError as error:
        raise _unreadable(name, source, error, **hub) from error
    if found is None:  # a local folder without it
        raise _unreadable(name, source, **hub)
    folder = os.path.dirname(found)
    check_folder(folder)
    raw = read_json(found)
    model_type = raw.get("model_type")
    if raw.get("quantization_config"):
        raise _quantised(name, repr(source), raw["quantization_config"])
    if model_type == UltraFuserConfig.model_type:
        raise _already_fused(name, raw.get("specialist_names"))
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        needs_code = bool(raw.get("auto_map"))
        reason = "needs remote code of its own, which is never run here" if needs_code else "is unknown"
        raise Refusal(
            f"{name!r} ({source!r}) is of type {model_type!r}, which {reason}",
            "A specialist must be of an architecture that transformers itself contains",
            "Convert it to a native architecture, or upgrade transformers if a newer version knows it.",
        )
    with in_words(f"The configuration of {name!r}", source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)


def _gguf_config(name: str, source: str) -> PreTrainedConfig:
    check_gguf(name, source)
    folder, arguments = gguf_arguments(source)
    try:
        config = AutoConfig.from_pretrained(folder, **arguments)
    # the package checks little of what it reads
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")
        raise Refusal(
            f"the GGUF file {source!r} of {name!r} cannot be read: {reason}",
            "It is broken, or of an architecture that transformers does not read from GGUF",
            "Fuse the folder that it was made from.",
        ) from error
    config.__dict__.pop("quantization_config", None)
    return config


# methods whose configuration can undo them while a model is read
_DEQUANTISE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}


def _quantised(name: str, what: str, written) -> Refusal:
    written = written if isinstance(written, dict) else getattr(written, "to_dict", dict)()
    method = str(getattr(written.get("quant_method"), "value", written.get("quant_method")))
    way_out = (
        "Fuse the unquantised model and quantise the result: `from_pretrained(..., quantization_config=...)`. Where there "
        "is no unquantised one, load it, make it plain if its method can, `model.dequantize()`, save it, and fuse that."
    )
    if method in _DEQUANTISE:
        way_out = (
            f"Make them plain once, and fuse that folder: `AutoModelForCausalLM.from_pretrained(ID, quantization_config="
            f"{_DEQUANTISE[method]}(dequantize=True)).save_pretrained(FOLDER, save_original_format=False)`, and its tokenizer "
            f"beside it."
        )
    elif method == "gguf":
        way_out = "Pass the file itself, NAME=FOLDER/FILE.gguf, which is dequantised while it is read."
    return Refusal(
        f"{name!r} is {what} with quantised weights",
        "A specialist must have plain weights, because its head becomes columns of one matrix",
        way_out,
    )


def _already_fused(name: str, specialist_names: list[str]) -> Refusal:
    return Refusal(
        f"{name!r} is itself a fused model of {specialist_names}",
        "A specialist is a single model",
        "Fuse those specialists instead: `model.specialist(name)` gives each back.",
    )


def _unreadable(name: str, source: str, error: OSError | None = None, **hub) -> Refusal:
    if file_or_none(source, "adapter_config.json", **hub) is not None:
        return Refusal(
            f"{name!r} ({source!r}) holds only an adapter",
            "A specialist must be a whole model here",
            "Merge it into its base first: "
            f"`AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload()`, then "
            "`.save_pretrained(...)`; or fuse all specialists as adapters of one base.",
        )
    if os.path.isdir(source):
        return UnavailableError(
            f"the folder of {name!r}, {source!r}, has no config.json, so it is no saved model",
            f"It holds {sorted(os.listdir(source))[:8]}",
            "Point to the folder that `save_pretrained` wrote.",
        )
    token = "a token was given" if hub.get("token") else "no token was given"
    return UnavailableError(
        f"the specialist {name!r} could not be read: {source!r} (revision {hub['revision']!r}) is neither a local "
        f"folder nor a Hub repository that can be reached",
        f"Here {token}; the Hub client said: {str(error).splitlines()[0].removesuffix('.')}",
        "Check the spelling; for a private or gated repository run `hf auth login` after accepting its terms; offline, "
        "pass a local folder.",
        about="access",
    )
