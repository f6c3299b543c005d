"""LoRA adapters as PEFT saves them: which base they are of, what of them is fused, and their tensors side by side."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

from .adapters_ultrafuser import EMBEDDING, HEAD, LINEAR, MERGE_FIRST, linear_shape, plain_embedding
from .files_ultrafuser import file_or_none, in_words, is_number, read_json
from .gguf_ultrafuser import is_gguf
from .reader_base_ultrafuser import BASE
from .refusals_ultrafuser import Refusal, UnavailableError
from .safetensors_ultrafuser import read_header


class Layer(NamedTuple):
    """A layer that can be adapted.

    Attributes:
        name: In the base's backbone; or `EMBEDDING` or `HEAD`.
        shape: Numbers that its output and its input have; the input of an embedding is one of as many tokens.
        key: How PEFT calls the matrices A and B of it.
    """

    name: str
    shape: torch.Size
    key: str = "lora_{}.weight"


# by name in the base's own model
Layers = dict[str, Layer]
# an adapter's two matrices for each layer of the backbone
Pairs = dict[str, tuple[Tensor, Tensor]]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SAY_BASE = "Say where it is with `base=`, on the command line `--base`"

# fields of a LoRA configuration that say where and how large it is, or how it was trained
_PLAIN_FIELDS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    # PEFT sets it by itself for layers that keep their weight transposed
    "fan_in_fan_out",
    *("loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_KINDS = {
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "r": int,
    "lora_alpha": int | float,
    "alpha_pattern": dict | None,
    "rank_pattern": dict | None,
}
# one of a kind, or a list of them
_LISTS = {"target_modules": str, "exclude_modules": str, "layers_to_transform": int, "layers_pattern": str}
MOST_REPETITIONS = 3
_UNBOUNDED = re.compile(r"\)[*+{]|\(\?|\\[0-9]")
# starts that leave the base's weights as they are
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass
class Adapters:
    """Specialists that are adapters of one base; some may be the base itself.

    Attributes:
        base: Its Hub id or folder, as the adapters name it.
        revision: Its branch, tag or commit.
        configs: Each specialist's adapter configuration by name; None for the base itself.
    """

    base: str
    revision: str
    configs: dict[str, dict | None]


def adapter_config(source, **hub) -> dict | None:
    """The configuration of the adapter in a folder or repository, or None if it holds no adapter alone."""
    if not isinstance(source, str | os.PathLike) or is_gguf(source):
        return None
    if file_or_none(source, "config.json", **hub) is not None:
        return None
    found = file_or_none(source, CONFIG_FILE, **hub)
    return found and read_json(found)


def read_adapters(specialists: dict, hub: dict[str, dict], given: str | os.PathLike | None = None) -> Adapters | None:
    """Finds the one base of all adapters; None if all specialists are whole models.

    Args:
        specialists: Name to Hub id or folder.
        hub: Of each, how it is fetched.
        given: Where their base is, if not where they say.

    Raises:
        ValueError: If adapters and models are mixed, or adapters are of different bases, or are more than LoRA.
    """
    configs = {name: adapter_config(s, **hub[name]) for name, s in specialists.items()}
    bases = {
        n: (c.get("base_model_name_or_path"), c.get("revision") or "main") for n, c in configs.items() if c is not None
    }
    if not bases:
        if given is not None:
            fact = f"`base` is given, and {list(specialists)} are whole models"
            raise Refusal(fact, "It is of specialists that are adapters of it", "Leave it out.")
        return None
    if given is not None:
        bases = dict.fromkeys(bases, (os.fspath(given), "main"))
    first, (base, revision) = next(iter(bases.items()))
    rule = "Specialists are whole models, or LoRA adapters of one base"
    way_out = (
        f"Fuse adapters of one base, with that base itself among them if you like. Is it one base under several names? "
        f"{SAY_BASE}; or {MERGE_FIRST}."
    )
    for name, source in specialists.items():
        if configs[name] is None and not _same_place(source, base):
            what = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else type(source).__name__
            fact = f"{first!r} holds only an adapter, of {base!r}, and {name!r} ({what}) is a whole model, and not that base"
            raise Refusal(fact, rule, way_out)
    if not base:
        raise Refusal(
            f"`base_model_name_or_path` of {first!r} is {base!r}",
            "An adapter says which base it is of",
            f"{SAY_BASE}; or {MERGE_FIRST}.",
        )
    for name, (other, at) in bases.items():
        if not _same_place(other, base) or at != revision:
            fact = f"{first!r} is an adapter of {base!r} at {revision!r}, and {name!r} one of {other!r} at {at!r}"
            raise Refusal(fact, rule, way_out)
        check_adapter(name, configs[name])
    return Adapters(base, revision, configs)


@contextmanager
def about_base(adapters: Adapters) -> Iterator[None]:
    """Says of what is refused of a base whose base it is, and what can be done about it."""
    try:
        yield
    except (ValueError, OSError) as error:
        of = " and ".join(repr(name) for name, config in adapters.configs.items() if config)
        reason = error.fact if isinstance(error, Refusal) else str(error)
        # by which name its tensors are kept is no word of the user's
        reason = reason.replace(f"specialist {BASE!r}", "base").replace(repr(BASE), "it")
        raise (UnavailableError if isinstance(error, OSError) else Refusal)(
            f"the base of {of}, {adapters.base!r}, is refused: {reason}",
            "Adapters are fused on the plain weights of their base",
            f"{SAY_BASE}, if its plain weights are elsewhere.",
            about=getattr(error, "about", "model"),
        ) from error


def _same_place(one, other) -> bool:
    if not isinstance(one, str | os.PathLike) or not isinstance(other, str | os.PathLike):
        return False
    return os.fspath(one) == os.fspath(other) or (
        os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other)
    )


def check_adapter(name: str, config: dict) -> None:
    """Refuses an adapter that is more than pairs of matrices added to linear layers.

    Raises:
        ValueError: Naming the first setting that makes it more.
    """
    for field, kinds in _KINDS.items():
        value = config.get(field)
        if not isinstance(value, kinds) or isinstance(value, bool) or (field == "lora_alpha" and not is_number(value)):
            raise _odd(name, field, value)
    for field, kind in _LISTS.items():
        value = config.get(field)
        if value is not None and not all(isinstance(v, kind) for v in (value if isinstance(value, list) else [value])):
            raise _odd(name, field, value)
    for field in ("alpha_pattern", "rank_pattern"):
        for pattern, value in (config.get(field) or {}).items():
            if not is_number(value):
                raise _odd(name, field, {pattern: value})
    # settings of a method that are empty choose it, too
    more = {k: v for k, v in config.items() if k not in _PLAIN_FIELDS and (v or v == {})}
    for key, plain in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("init_lora_weights", _PLAIN_STARTS)):
        if not any(config.get(key) == p for p in plain):
            more[key] = config.get(key)
    if more:
        key, value = next(iter(more.items()))
        raise Refusal(
            f"{name!r} has {key}={value!r}",
            "An adapter is fused if it adds pairs of matrices to linear layers and does nothing else (LoRA)",
            f"Train it without, or {MERGE_FIRST}.",
        )


def _odd(name: str, field: str, value) -> Refusal:
    return Refusal(
        f"`{field}` in the {CONFIG_FILE} of {name!r} is {str(value)[:200]!r}",
        "It is as PEFT writes it",
        f"Fetch it again, or {MERGE_FIRST}.",
    )


def read_tensors(name: str, source: str, **hub) -> dict[str, Tensor]:
    """An adapter's tensors by the names that PEFT gave them.

    Raises:
        OSError: If they cannot be read, or are not in the safetensors format.
    """
    file = adapter_file(name, source, **hub)
    read_header(file)
    with in_words(f"The adapter {name!r}", source):
        return load_state_dict(file)


def adapter_file(name: str, source: str, **hub) -> str:
    """The safetensors file of an adapter on this machine, downloaded if need be.

    Raises:
        OSError: If there is none.
    """
    file = file_or_none(source, WEIGHTS_FILE, **hub)
    if file is None:
        raise UnavailableError(
            f"the adapter {name!r} ({os.fspath(source)!r}) holds no {WEIGHTS_FILE}",
            "Only the safetensors format is read, because others can run code",
            "Load and save it once with PEFT to convert it.",
            about="weights",
        )
    return file


def adaptable(model: PreTrainedModel, backbone_type: type) -> Layers:
    """Linear layers of a base's backbone, its embedding if that is a plain table, and its head if that is linear."""
    prefix, backbone = next((n, m) for n, m in model.named_modules() if type(m) is backbone_type)
    start = f"{prefix}." if prefix else ""
    linear = {n: m for n, m in backbone.named_modules() if isinstance(m, LINEAR)}
    layers = {f"{start}{n}": Layer(n, torch.Size(linear_shape(m))) for n, m in linear.items()}
    if embedding := plain_embedding(backbone):
        shape = torch.Size(reversed(backbone.get_submodule(embedding).weight.shape))
        layers[f"{start}{embedding}"] = Layer(EMBEDDING, shape, "lora_embedding_{}")
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        name = next(n for n, m in model.named_modules() if m is head)
        layers[name] = Layer(HEAD, torch.Size(linear_shape(head)))
    return layers


def read_parts(adapters: Adapters, specialists: dict, hub: dict[str, dict], layers: Layers) -> dict[str, Pairs]:
    """Returns the output of `pairs` by specialist; empty for the base itself."""
    return {
        name: {} if config is None else pairs(name, config, read_tensors(name, specialists[name], **hub[name]), layers)
        for name, config in adapters.configs.items()
    }


def pairs(name: str, config: dict, tensors: dict[str, Tensor], layers: Layers) -> Pairs:
    """An adapter's two matrices for each layer that it is on, the scale in the second.

    Args:
        name: Of the specialist.
        config: Of the adapter.
        tensors: By the names that PEFT gave them; on the meta device is enough to check them.
        layers: What `adaptable` found in the base.

    Returns:
        Layer to A, (rank, in), and B, (rank, out), so that its change is x A^T B.

    Raises:
        ValueError: If there is anything that is no part of such a pair.
    """
    known = {f"base_model.model.{m}.{layer.key.format(p)}": (m, p) for m, layer in layers.items() for p in "AB"}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key not in known:
            raise _elsewhere(name, key)
        module, part = known[key]
        found.setdefault(module, {})[part] = tensor
    result = {}
    for module, two in found.items():
        (layer, shape, _), a, b = layers[module], two.get("A"), two.get("B")
        ranks = {config["r"], *(config.get("rank_pattern") or {}).values()}
        shapes = [None if t is None else tuple(t.shape) for t in (a, b)]
        rank = shapes[0][0] if shapes[0] else 0
        if shapes != [(rank, shape[1]), (shape[0], rank)]:
            raise Refusal(
                f"matrices of {name!r} for `{module}`, which is {tuple(shape)}, have shapes {shapes}",
                "An adapter's matrices fit the layer of its base",
                "It is of another base, or not whole: download it again.",
            )
        if rank not in ranks or not (a.is_floating_point() and b.is_floating_point()):
            raise Refusal(
                f"matrices of {name!r} for `{module}` are {a.dtype} of rank {rank}",
                f"An adapter's matrices are floating point numbers of the rank that its {CONFIG_FILE} says, "
                f"{sorted(ranks)}",
                "Download it again.",
            )
        if not a.is_meta and not all(torch.isfinite(t).all() for t in (a, b)):
            raise Refusal(
                f"matrices of {name!r} for `{module}` hold numbers that are not finite",
                "An adapter's matrices must be finite numbers",
                "Download it again, or leave it out.",
            )
        _check_target(name, config, module)
        wide = b.to(torch.promote_types(b.dtype, torch.float32))
        result[layer] = (a, (wide * _scale(config, module, rank)).T)
    return result


def _elsewhere(name: str, key: str) -> Refusal:
    way_out = f"Train it without, or {MERGE_FIRST}."
    if key.endswith(".base_layer.weight"):
        way_out = (
            "Save it once more without the base's own tables: `save_pretrained(..., save_embedding_layers=False)`."
        )
    return Refusal(
        f"{name!r} holds `{key}`",
        "An adapter is fused if all of it is pairs of matrices on linear layers of its base, on the token embedding if "
        "that is a plain table, or on the head",
        way_out,
    )


def _check_target(name: str, config: dict, module: str) -> None:
    """Refuses a layer that the adapter's configuration leaves out, whose matrices PEFT would not use.

    Raises:
        ValueError: Naming the field and the layer.
    """
    for field, wanted in (("target_modules", True), ("exclude_modules", False), ("layers_to_transform", True)):
        value = config.get(field)
        if value == "all-linear":
            continue
        if field == "layers_to_transform":
            named = _is_in_layers(module, config)
        elif isinstance(value, str):
            named = _is_named(module, value, field, whole=True)
        else:
            # PEFT has names of its own for a family if there are none, and writes them down when it saves
            named = any(module == leaf or module.endswith(f".{leaf}") for leaf in value or ())
        if named != wanted:
            raise Refusal(
                f"{name!r} has matrices of `{module}`, a layer that `{field}` leaves out",
                f"An adapter's files hold matrices of just the layers that its {CONFIG_FILE} names",
                f"Download it again, or {MERGE_FIRST}.",
            )


def _is_in_layers(module: str, config: dict) -> bool:
    """Returns whether a module is in a layer that a LoRA configuration chooses by number, as PEFT reads it."""
    chosen, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if chosen is None or chosen == [] or module in (config.get("target_modules") or ()):
        return True
    around = "|".join(map(re.escape, [patterns] if isinstance(patterns, str) else patterns)) or "[^.]*"
    number = re.match(rf"(?:^|.*?\.)(?:{around})\.(\d+)\.", module)
    return number is not None and int(number[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _scale(config: dict, module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if _is_named(module, pattern):
            alpha = own
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_named(module: str, pattern: str, field: str = "alpha_pattern", whole: bool = False) -> bool:
    """Returns whether a pattern of a LoRA configuration matches a layer, as PEFT reads it.

    Args:
        module: Name of the layer.
        pattern: A regular expression.
        field: Where it stands.
        whole: Whether it means the whole name, not the end of one.

    Raises:
        ValueError: If it is no regular expression, or one that can take for ever on a name.
    """
    reason = None
    # time grows with the power of repetitions, and without a bound if one repeats another
    if _UNBOUNDED.search(pattern) or len(re.findall(r"[*+?{]", pattern)) > MOST_REPETITIONS:
        reason = f"repeats a group, or more than {MOST_REPETITIONS} times, which can take for ever"
    else:
        try:
            return re.fullmatch(pattern if whole else rf"(.*\.)?({pattern})$", module) is not None
        except (re.error, RecursionError, OverflowError) as error:
            reason = f"is none: {error}"
    raise Refusal(
        f"`{field}` of an adapter is {pattern[:100]!r}, which {reason}",
        "It names layers by regular expressions",
        f"Write the names of layers in its place, or {MERGE_FIRST}.",
    )
