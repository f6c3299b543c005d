"""What is refused before any weight is loaded: each with the rule and its reason, what came, and the way out."""

import copy
import inspect
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from .causal_ultrafuser import check_causal_class
from .configuration_ultrafuser import UltraFuserConfig, refuse_ambiguous_names
from .gguf_ultrafuser import check_gguf, gguf_arguments, is_gguf
from .reading_ultrafuser import (
    FLOATS,
    check_config,
    check_folder,
    in_words,
    read_headers,
    read_json,
    weight_files,
)
from .specialists_ultrafuser import is_plain
from .versions_ultrafuser import CACHE


DTYPE_RULE = (
    "All specialists of a fused model have one dtype, because one head multiplies all their hidden states, but they "
    "are {}. Choose one: dtype=torch.bfloat16, say."
)

MOST_NUMBERS_MADE_UP = 1 << 28


def common_dtype(specialists: dict, configs: dict[str, PreTrainedConfig]) -> torch.dtype | None:
    """The dtype that all specialists share, None if none writes one down, or a refusal."""
    dtypes = {n: as_dtype(c.dtype or c.get_text_config(decoder=True).dtype) for n, c in configs.items()}
    # a model in memory may have been cast since its configuration was written
    dtypes |= {n: s.dtype for n, s in specialists.items() if isinstance(s, PreTrainedModel)}
    if len(set(dtypes.values()) - {None}) > 1:
        raise ValueError(DTYPE_RULE.format(dtypes))
    return next((d for d in dtypes.values() if d is not None), None)


def check_names(config: UltraFuserConfig) -> None:
    """Refuses names of specialists that are words in the paths of their modules, or fields of their configurations."""
    parts = {part for b in empty_backbones(config) for path, _ in b.named_parameters() for part in path.split(".")}
    refuse_ambiguous_names(config.specialist_names, config.backbones, parts)


def empty_backbones(config: UltraFuserConfig) -> list[PreTrainedModel]:
    """The backbones of a fused model without any numbers."""
    backbones = []
    for name, c in zip(config.specialist_names, config.backbones, strict=False):
        with in_words(f"The configuration of {name!r}", c.name_or_path), torch.device("meta"):
            backbones.append(AutoModel.from_config(copy.deepcopy(c)))
    return backbones


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`dtype` must be 'auto' or a floating point type such as torch.bfloat16, but got {dtype!r}.")
    return found


def own_config(name: str, source, **hub) -> PreTrainedConfig:
    """The specialist's configuration, or a sentence saying why this is no specialist."""
    if isinstance(source, PreTrainedModel):
        # one that was read from a quantised file may be plain since
        weights = (*source.parameters(), *(b for b in source.buffers() if b.ndim > 1))
        if getattr(source, "hf_quantizer", None) is not None and not all(map(is_plain, weights)):
            raise ValueError(_quantised(name, "a quantised model in memory", source.config))
        if source.config.model_type == UltraFuserConfig.model_type:
            raise ValueError(_already_fused(name, source.config.specialist_names))
        if any(type(module).__module__.startswith("peft.") for module in source.modules()):
            raise ValueError(
                f"A specialist in memory is a plain model, but {name!r} ({type(source).__name__}) has an adapter of PEFT on "
                f"its layers. Save the adapter, `save_pretrained(FOLDER)`, and pass that folder, because LoRA adapters of "
                f"one base are fused from their folders; or merge it, `merge_and_unload()` of a PEFT model, or take it "
                f"off, `delete_adapter(...)`."
            )
        config = copy.deepcopy(source.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
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
        raise ValueError(
            f"A specialist is a folder or a Hub id, but {name!r} is the file {source!r}. Pass the folder that "
            f"holds it; of files alone GGUF is read."
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
        raise ValueError(_quantised(name, repr(source), raw))
    if model_type == UltraFuserConfig.model_type:
        raise ValueError(_already_fused(name, raw.get("specialist_names")))
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        needs_code = bool(raw.get("auto_map"))
        reason = "needs remote code of its own, which is never run here" if needs_code else "is unknown"
        raise ValueError(
            f"A specialist must be of an architecture that transformers itself contains, but {name!r} ({source!r}) is "
            f"of type {model_type!r}, which {reason}. Convert it to a native architecture, or upgrade transformers if "
            f"a newer version knows it."
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
        raise ValueError(
            f"The GGUF file {source!r} of {name!r} cannot be read: {reason}. It is broken, or of an architecture that "
            f"transformers does not read from GGUF: fuse the folder that it was made from."
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


# methods whose configuration can undo them while a model is read
_DEQUANTISE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}


def _quantised(name: str, what: str, config) -> str:
    written = (
        config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
    )
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
    return (
        f"A specialist must have plain weights, because its head becomes columns of one matrix, but {name!r} is "
        f"{what} with quantised weights. {way_out}"
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
    if CACHE not in inspect.signature(backbone_class(text_config).forward).parameters:
        raise ValueError(
            f"A specialist must have attention layers with a key-value cache, because all specialists share one, but "
            f"{kind}, which keeps another kind of state. Use a transformer or a hybrid."
        )
    unsaid = [field for field in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(text_config, field)]
    if unsaid:
        raise ValueError(
            f"A specialist's configuration must say how many tokens it knows, how wide and how deep it is, because the "
            f"fused model's follows from that, but {kind}, which does not say {unsaid}. Use another architecture."
        )
    if hasattr(backbone_class(text_config), "_setup_cache"):
        raise ValueError(
            f"A specialist must keep all that it remembers of a text in a cache, because generation reorders and repeats "
            f"that, but {kind}, which keeps recurrent states in its layers. Use a transformer or a hybrid."
        )
    check_causal_class(name, text_config, backbone_class(text_config))


def parts_of(name: str, model: PreTrainedModel, config: PreTrainedConfig) -> tuple[PreTrainedModel, nn.Module]:
    """A specialist's backbone, and its head, which must be one matrix on the backbone's last hidden state.

    Raises:
        ValueError: Naming the specialist and what it has instead.
    """
    kind, backbone_type = f"{name!r} ({type(model).__name__})", backbone_class(config)
    backbone = next((m for m in model.modules() if type(m) is backbone_type), None)
    head = model.get_output_embeddings()
    if backbone is None or head is None:
        raise ValueError(
            f"A specialist must be a backbone followed by a linear head, but {kind} holds "
            f"no {backbone_type.__name__} or no output embeddings. It cannot be fused."
        )
    embedding, rows = backbone.get_input_embeddings().weight, backbone.config.vocab_size
    if embedding.shape[0] != rows:
        raise ValueError(
            f"A specialist must know as many tokens as it says, because rows beyond the common vocabulary are cut, but the "
            f"embedding of {kind} has {embedding.shape[0]} rows and its vocabulary {rows}. It cannot be fused."
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"A specialist's head must have no bias, because a bias could not be weighed by the gate inside one "
            f"linear head, but the head of {kind} has one. If it is all zeros, set it to None before fusing."
        )
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or weight is None or weight.shape[1] != config.hidden_size:
        raise ValueError(
            f"A specialist's head must be one matrix that reads its hidden state, {config.hidden_size} numbers, because "
            f"the heads of all become one, but that of {kind} is {head}. It cannot be fused."
        )
    return backbone, head


def check_saving(config: UltraFuserConfig) -> None:
    """Refuses specialists whose configuration does not survive being saved as a part of the fused model's.

    Raises:
        ValueError: Naming the first such specialist, or the whole, and what happened.
    """
    parts = dict(zip(config.specialist_names, config.specialists, strict=True)) | {"the fused model": config}
    for name, part in parts.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
                read = type(part).from_pretrained(folder)
            lost = [k for k, v in _plain(part).items() if _plain(read).get(k) != v]
        except Exception as error:
            raise ValueError(
                f"A fused model is saved with the configuration of every specialist, but that of {name!r} "
                f"({part.model_type!r}) cannot be: {type(error).__name__}: {' '.join(str(error).split())} Correct its "
                f"config.json, or fuse a model of another family."
            ) from error
        if lost:
            raise ValueError(
                f"A fused model is saved with the configuration of every specialist, but {lost} of {name!r} "
                f"({part.model_type!r}) are read back as something else. Correct its config.json, or fuse a model of "
                f"another family."
            )


def _plain(config: PreTrainedConfig) -> dict:
    """What a configuration says, as its file would."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k not in _OF_THE_FILE}


# what saving itself writes
_OF_THE_FILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "auto_map")


def empty_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A specialist's model without any numbers."""
    with in_words(f"The configuration of {name!r}", config.name_or_path), torch.device("meta"):
        return auto_class(name, config).from_config(copy.deepcopy(config))


def check_weights(
    name: str, config: PreTrainedConfig, header: dict[str, tuple[str, tuple[int, ...]]]
) -> PreTrainedModel:
    """Refuses files that do not hold exactly the tensors that a configuration asks for. Reads no numbers.

    Args:
        name: Of the specialist.
        config: Its own.
        header: Type and shape of each tensor in its files.

    Returns:
        The specialist's model without any numbers.

    Raises:
        ValueError: Naming the first tensor that is missing, left over, or of another shape or type.
    """
    layers = [getattr(c, "num_hidden_layers", None) or 0 for c in (config, config.get_text_config(decoder=True))]
    if max(layers) > len(header):
        raise ValueError(
            f"A layer has one tensor at least, but {name!r} has {max(layers):,} layers by its config.json, and "
            f"{len(header)} tensors in its files. Correct its config.json, or download both again."
        )
    model = empty_model(name, config)
    with in_words(f"The configuration of {name!r}", config.name_or_path):
        model.config.validate()  # or saving would refuse it
        refuse_other_tensors(repr(name), *_odd_tensors(type(model).from_pretrained, model, header))
    return model


def check_gguf_weights(name: str, source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Refuses a GGUF file that does not hold as many numbers as its metadata asks for. Reads none.

    Returns:
        The specialist's model without any numbers.

    Raises:
        ValueError: Naming it.
    """
    shapes = check_gguf(name, source)
    scaled = sorted(key for key in shapes if key.startswith("rope_"))
    if scaled and "'rope_type': 'default'" in repr(getattr(config, "rope_parameters", None)):
        raise ValueError(
            f"Every tensor of a file must be used, or the fused model would not speak as its specialist does, but `{scaled[0]}` "
            f"of {source!r}, {name!r}, scales rotary positions, and transformers passes it over. Fuse the folder that it "
            f"was made from."
        )
    model = empty_model(name, config)
    asked = sum(p.numel() for p in model.parameters())
    held = sum(math.prod(shape) for key, shape in shapes.items() if key not in scaled)
    if asked != held:
        raise ValueError(
            f"A model's file must hold exactly the tensors that its metadata asks for, because others would be made up or "
            f"dropped, but {source!r} of {name!r} holds {held:,} numbers, and its metadata asks for {asked:,}. Fetch it "
            f"again; or fuse the folder that it was made from."
        )
    return model


def check_fused(load: Callable, cls: type[PreTrainedModel], source: str | os.PathLike, **hub) -> None:
    """Refuses a fused model's folder that does not hold exactly the tensors that its config.json asks for.

    What the folder holds beside them is passed over if it is the head of a class that this one is not: of the causal
    language model, or a head for values as TRL saves it. What such a class has and the folder has not is its own matter.

    Args:
        load: The library's `from_pretrained` of that class.
        cls: Of the model that is to be loaded.
        source: Hub id or folder.
        **hub: As for `from_pretrained`.

    Raises:
        ValueError: Naming the first tensor that is missing, left over, or of another shape or type.
        OSError: If there is nothing.
    """
    file = cached_file(source, "config.json", **{**hub, "_raise_exceptions_for_missing_entries": False})
    if file is None:  # the library says so
        return
    check_folder(os.path.dirname(file))
    files = weight_files(source, **hub)
    raw = read_json(file)
    if files is None or raw.get("quantization_config") or is_deepspeed_zero3_enabled():
        return
    header = read_headers(files)
    check_config(file, len(header))
    with in_words("The fused model's configuration", source):
        config = cls.config_class.from_pretrained(os.path.dirname(file))
        with torch.device("meta"):
            model = cls(config)
        # or saving would refuse it
        for own in (model.config, *model.config.specialists):
            own.validate()
        missing, left_over, *rest = _odd_tensors(load, model, header)
    ours = re.compile(r"(^|\.)(specialists|fusion_gate|lm_head)\.")
    passed = re.compile(r"^v_head\." if hasattr(model, "lm_head") else r"^(v_head|lm_head)\.")
    missing, left_over = {k for k in missing if ours.search(k)}, {k for k in left_over if not passed.search(k)}
    refuse_other_tensors(f"the fused model {os.fspath(source)!r}", missing, left_over, *rest)


def _odd_tensors(
    load: Callable, model: PreTrainedModel, header: dict[str, tuple[str, tuple[int, ...]]]
) -> tuple[set[str], set[str], set[tuple], dict[str, str]]:
    """What files lack of a model, what they have no place for, other shapes, and those that are no floating point."""

    def loaded(state: dict[str, Tensor]) -> dict:
        # loading translates names as the families need, so it is loading that says which tensors have a place
        config = copy.deepcopy(model.config)
        options = {"device_map": "meta", "dtype": torch.float32, "ignore_mismatched_sizes": True}
        with quiet_loading():
            return load(None, config=config, state_dict=state, output_loading_info=True, **options)[1]

    made_up = sum(b.numel() for b in model.buffers())
    if made_up > MOST_NUMBERS_MADE_UP:
        raise ValueError(
            f"What is computed from a configuration, such as rotary frequencies, is small beside the weights, but this one "
            f"asks for {made_up:,} numbers. Correct its config.json."
        )
    state = empty_tensors(header)
    info = loaded(state)
    missing, others = info["missing_keys"], {key: dtype for key, (dtype, _) in header.items() if dtype not in FLOATS}
    if others:
        numbers = {n for n, t in model.state_dict().items() if t.is_floating_point()}
        without = loaded({k: t for k, t in state.items() if k not in others})
        # one of several experts that lie in one tensor is missing from its shape
        missing = missing | numbers & {*without["missing_keys"], *(key for key, _, _ in without["mismatched_keys"])}
    return missing, info["unexpected_keys"], info["mismatched_keys"], others


def empty_tensors(header: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors of the shapes that files have, without any numbers; whatever is no floating point as integers."""
    return {
        key: torch.empty(shape, device="meta", dtype=torch.float32 if dtype in FLOATS else torch.int32)
        for key, (dtype, shape) in header.items()
    }


def refuse_other_tensors(
    what: str, missing: set[str], left_over: set[str], mismatched: set[tuple], others: dict[str, str] | None = None
) -> None:
    """Refuses files whose tensors are not the model's.

    Args:
        what: Is loaded, in a word or two.
        missing: Names of tensors that the configuration asks for and no file holds.
        left_over: Names of tensors in the files that have no place.
        mismatched: Name, shape in the files and shape by the configuration.
        others: Those in the files that are no floating point numbers, with their types.

    Raises:
        ValueError: Naming the first of each.
    """
    told = [
        f"`{key}` has shape {tuple(saved)} in its files and {tuple(own)} by its config.json"
        for key, saved, own in sorted(mismatched)[:1]
    ]
    if others and missing:
        key = min(missing & others.keys(), default=min(others))
        told.append(f"`{key}` is {others[key]} in its files, which are no floating point numbers")
    elif missing:
        told.append(f"{len(missing)} are missing, such as `{min(missing)}`")
    if left_over:
        told.append(f"{len(left_over)} have no place in the model, such as `{min(left_over)}`")
    if told:
        raise ValueError(
            f"A model's files must hold exactly the tensors that its configuration asks for, because others would be made "
            f"up or dropped, but of {what} {'; '.join(told)}. Correct its config.json, or download both again."
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bars and its report of what was not there: what is wrong is said by an error."""
    shown = hf_logging.is_progress_bar_enabled()
    # the second tells of layers that are not sharded as soon as the first has a level of its own
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            hf_logging.enable_progress_bar()


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
