"""Checks that files hold exactly the tensors that a configuration asks for, and that loading has put them in place."""

import copy
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .architecture_ultrafuser import empty_model
from .compat_ultrafuser import file_if_any, forget
from .files_ultrafuser import in_words, read_json
from .folder_ultrafuser import check_config, check_folder
from .gguf_ultrafuser import check_gguf
from .log_ultrafuser import no_bars
from .refusals_ultrafuser import Refusal
from .safetensors_ultrafuser import FLOATS, Header, read_headers, weight_files


MOST_NUMBERS_MADE_UP = 1 << 28


def check_weights(name: str, config: PreTrainedConfig, header: Header) -> PreTrainedModel:
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
        raise Refusal(
            f"{name!r} has {max(layers):,} layers by its config.json, and {len(header)} tensors in its files",
            "A layer has one tensor at least",
            "Correct its config.json, or download both again.",
            about="weights",
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
        raise Refusal(
            f"`{scaled[0]}` of {source!r}, {name!r}, scales rotary positions, and transformers passes it over",
            "Every tensor of a file must be used, or the fused model would not speak as its specialist does",
            "Fuse the folder that it was made from.",
            about="weights",
        )
    model = empty_model(name, config)
    asked = sum(p.numel() for p in model.parameters())
    held = sum(math.prod(shape) for key, shape in shapes.items() if key not in scaled)
    if asked != held:
        raise Refusal(
            f"{source!r} of {name!r} holds {held:,} numbers, and its metadata asks for {asked:,}",
            "A model's file must hold exactly the tensors that its metadata asks for, because others would be "
            "made up or dropped",
            "Fetch it again; or fuse the folder that it was made from.",
            about="weights",
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
    file = file_if_any(source, "config.json", **hub)
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
    load: Callable, model: PreTrainedModel, header: Header
) -> tuple[set[str], set[str], set[tuple], dict[str, str]]:
    """Compares files with a model: missing tensors, unexpected ones, other shapes, and those that are not floating point."""

    def loaded(state: dict[str, Tensor]) -> dict:
        # loading translates names as the families need, so it is loading that says which tensors have a place
        config = copy.deepcopy(model.config)
        options = {"device_map": "meta", "dtype": torch.float32, "ignore_mismatched_sizes": True}
        with quiet_loading():
            return load(None, config=config, state_dict=state, output_loading_info=True, **options)[1]

    made_up = sum(b.numel() for b in model.buffers())
    if made_up > MOST_NUMBERS_MADE_UP:
        raise Refusal(
            f"a configuration asks for {made_up:,} numbers that are computed, such as rotary frequencies",
            "What is computed from a configuration is small beside the weights",
            "Correct its config.json.",
            about="weights",
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


def empty_tensors(header: Header) -> dict[str, Tensor]:
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
        raise Refusal(
            f"of {what} {'; '.join(told)}",
            "A model's files must hold exactly the tensors that its configuration asks for, because others would "
            "be made up or dropped",
            "Correct its config.json, or download both again.",
            about="weights",
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bars and its report of what was not there: what is wrong is said by an error."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)


def refuse_other_specialists(names: list[str], parts: list[str], parameters: list[str], loading_info) -> None:
    """Rejects a checkpoint of other specialists than the configuration names, with one sentence.

    Nothing is said if no specialist was in the checkpoint at all: an adapter, or an empty state on purpose.

    Args:
        names: Of the specialists.
        parts: Names in `Specialists`: theirs, or the base's.
        parameters: Names of the model's.
        loading_info: The library's, of what is missing and what is left over.
    """

    def specialist_of(key: str) -> str | None:
        found = re.search(r"(?:^|\.)specialists\.(\w+)\.", key)
        return found and found[1]

    extra = {specialist_of(key) for key in loading_info.unexpected_keys} - {*parts, None}
    found = {specialist_of(key) for key in parameters if key not in loading_info.missing_keys} - {None}
    shapes = [
        f"`{key}` has shape {tuple(saved)} there and {tuple(own)} here"
        for key, saved, own in sorted(loading_info.mismatched_keys)
        if (key == "lm_head.weight" and saved[-1] != own[-1])
        or ("fusion_gate." in key and own[0] == len(names) and saved[0] != own[0])
        or (".lora_" in key and saved[0] != own[0])
    ]
    no_adapters = found and any(".lora_" in key for key in loading_info.missing_keys if key in parameters)
    if extra or shapes or no_adapters or 0 < len(found) < len(parts):
        there = [n for n in parts if n in found] + sorted(extra)
        forget(loading_info)
        raise ValueError(
            f"A checkpoint must hold the specialists that its configuration names, because gate and head have a part "
            f"for each, but it holds {len(there)} ({there}) and the configuration names {len(names)} ({names})"
            f"{''.join('; ' + shape for shape in shapes)}. Load it with the config.json that was saved with it, or fuse "
            f"anew with `UltraFuserForCausalLM.from_specialists`."
        )


def is_plain(weight: Tensor) -> bool:
    """Returns whether a tensor is unquantized. `is_floating_point()` is not enough: torchao's quantized tensors are, too."""
    ours = type(weight.data).__module__.split(".")[0] == "torch"
    return ours and weight.is_floating_point() and weight.element_size() > 1


def refuse_quantised_head(head: nn.Module | None) -> None:
    """Rejects a head without plain weights. Quantisers leave it alone unless they are told what to leave alone."""
    weight = getattr(head, "weight", None)
    if head is None or (isinstance(weight, Tensor) and is_plain(weight)):
        return
    raise ValueError(
        f"The head of a fused model must have plain weights, because each specialist has columns of its own in it, but "
        f"it became a {type(head).__name__} of {type(weight).__name__}. Add 'lm_head' to the modules that the quantiser "
        f"leaves alone: llm_int8_skip_modules=['lm_head', ...] of BitsAndBytesConfig, modules_to_not_convert=['lm_head', "
        f"...] of others. Without a list they do so by themselves."
    )
