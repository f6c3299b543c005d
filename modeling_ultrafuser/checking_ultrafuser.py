"""What is refused before any weight is loaded: each with the rule and its reason, what came, and the way out."""

import inspect
import os

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from .configuration_ultrafuser import UltraFuserConfig


DTYPE_RULE = (
    "All specialists of a fused model have one dtype, because one head multiplies all their hidden states, but they "
    "are {}. Choose one: dtype=torch.bfloat16, say."
)


def common_dtype(specialists: dict, configs: dict[str, PreTrainedConfig]) -> torch.dtype | None:
    """The dtype that all specialists share, None if none writes one down, or a refusal."""
    dtypes = {n: as_dtype(c.dtype or c.get_text_config(decoder=True).dtype) for n, c in configs.items()}
    # a model in memory may have been cast since its configuration was written
    dtypes |= {n: s.dtype for n, s in specialists.items() if isinstance(s, PreTrainedModel)}
    if len(set(dtypes.values()) - {None}) > 1:
        raise ValueError(DTYPE_RULE.format(dtypes))
    return next((d for d in dtypes.values() if d is not None), None)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`dtype` must be 'auto' or a floating point type such as torch.bfloat16, but got {dtype!r}.")
    return found


def own_config(name: str, source, **hub) -> PreTrainedConfig:
    """The specialist's configuration, or a sentence saying why this is no specialist."""
    if isinstance(source, PreTrainedModel):
        if getattr(source, "quantization_method", None) is not None or getattr(source, "hf_quantizer", None):
            raise ValueError(_quantised(name, "a quantised model in memory"))
        if source.config.model_type == UltraFuserConfig.model_type:
            raise ValueError(_already_fused(name, source.config.specialist_names))
        return source.config
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"A specialist is a Hub id, a local folder or a transformers model, but {name!r} is a "
            f"{type(source).__name__}. A PEFT model must be merged first, `model.merge_and_unload()`; or saved, because "
            f"LoRA adapters of one base are fused from their folders."
        )
    source = os.fspath(source)
    if os.path.isfile(source):
        raise ValueError(f"A specialist is a folder or a Hub id, but {name!r} is the file {source!r}.")
    try:
        found = cached_file(source, "config.json", **hub)
    except OSError as error:
        raise _unreadable(name, source, error, **hub) from error
    if found is None:  # a local folder without it
        raise _unreadable(name, source, **hub)
    raw, _ = PreTrainedConfig.get_config_dict(os.path.dirname(found))
    model_type = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError(_quantised(name, repr(source)))
    if model_type == UltraFuserConfig.model_type:
        raise ValueError(_already_fused(name, raw.get("specialist_names")))
    if model_type not in CONFIG_MAPPING:
        needs_code = bool(raw.get("auto_map"))
        reason = "needs remote code of its own, which is never run here" if needs_code else "is unknown"
        raise ValueError(
            f"A specialist must be of an architecture that transformers itself contains, but {name!r} ({source!r}) is "
            f"of type {model_type!r}, which {reason}. Convert it to a native architecture, or upgrade transformers if "
            f"a newer version knows it."
        )
    return AutoConfig.from_pretrained(source, **hub)


def _quantised(name: str, what: str) -> str:
    return (
        f"A specialist must have plain weights, because its head becomes columns of one matrix, but {name!r} is "
        f"{what} with quantised weights. Fuse the unquantised model and quantise the result: "
        f"`from_pretrained(..., quantization_config=...)`."
    )


def _already_fused(name: str, specialist_names: list[str]) -> str:
    return (
        f"A specialist is a single model, but {name!r} is itself a fused model of {specialist_names}. Fuse those "
        f"specialists instead: `model.specialist(name)` gives each back."
    )


def _unreadable(name: str, source: str, error: OSError | None = None, **hub) -> OSError | ValueError:
    try:
        adapter = cached_file(source, "adapter_config.json", **hub)
    except OSError:
        adapter = None
    if adapter is not None:
        return ValueError(
            f"A specialist must be a whole model here, but {name!r} ({source!r}) holds only an adapter. Merge it into its "
            f"base first: `AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload()`, then "
            f"`.save_pretrained(...)`; or fuse all specialists as adapters of one base."
        )
    if os.path.isdir(source):
        return FileNotFoundError(
            f"The folder of {name!r}, {source!r}, has no config.json, so it is no saved model. It holds "
            f"{sorted(os.listdir(source))[:8]}. Point to the folder that `save_pretrained` wrote."
        )
    token = "a token was given" if hub.get("token") else "no token was given"
    return OSError(
        f"The specialist {name!r} could not be read: {source!r} (revision {hub['revision']!r}) is neither a local "
        f"folder nor a Hub repository that can be reached; {token}. Check the spelling; for a private or gated "
        f"repository run `hf auth login` after accepting its terms; offline, pass a local folder. "
        f"The Hub client said: {str(error).splitlines()[0]}"
    )


def check_architecture(name: str, config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    """Refuses what is no causal decoder with a key-value cache."""
    kind = f"{name!r} is a {config.model_type!r} model"
    suffixes = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
    saved_as = config.architectures or []
    if config.is_encoder_decoder or (saved_as and not any(a.endswith(suffixes) for a in saved_as)):
        raise ValueError(
            f"A specialist must be a decoder with a language-model head, but {kind} saved as {saved_as}: an encoder, "
            f"an encoder-decoder, or a model without its head. Use a causal language model."
        )
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(text_config) not in MODEL_MAPPING:
        raise ValueError(
            f"A specialist must be a causal language model, or contain one as its text part, but {kind}, for which "
            f"transformers has no causal language model. Use one that `AutoModelForCausalLM` can load."
        )
    if "past_key_values" not in inspect.signature(backbone_class(text_config).forward).parameters:
        raise ValueError(
            f"A specialist must have attention layers with a key-value cache, because all specialists share one, but "
            f"{kind}, which keeps another kind of state. Use a transformer or a hybrid."
        )


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a specialist without its head."""
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def auto_class(name: str, config: PreTrainedConfig) -> type:
    """Which auto class loads this checkpoint together with its head."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(
        f"A specialist must be a causal language model, or read images beside text, but {name!r} is a "
        f"{config.model_type!r} model, whose text part cannot be loaded on its own. Load it and pass the model."
    )
