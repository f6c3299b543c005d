"""From specialists to a fused model: what is checked, loaded, cut, scaled and probed on the way."""

import copy
import os
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.utils import logging

from .adapters_ultrafuser import adapted_state, layout
from .architecture_ultrafuser import auto_class, backbone_class, check_architecture, empty_model, parts_of
from .causal_ultrafuser import check_head_dtype
from .checkpoint_ultrafuser import check_gguf_weights, check_weights, refuse_other_tensors
from .configuration_ultrafuser import UltraFuserConfig
from .families_ultrafuser import SCALE_FIELDS, soft_cap, spoken_rows
from .files_ultrafuser import in_words
from .gates_ultrafuser import DEFAULT_GATE, GATES, gate_settings
from .generation_config_ultrafuser import merged_generation_config, own_generation_config
from .gguf_ultrafuser import dequantised, gguf_arguments, is_gguf
from .inputs_ultrafuser import NO_ROUTER_LOSS
from .log_ultrafuser import print_line
from .lora_ultrafuser import about_base, adaptable, read_adapters, read_parts
from .plan_ultrafuser import DTYPE_RULE, as_dtype, check_names, check_saving, common_dtype
from .probing_ultrafuser import check_steps, step_alone, step_within
from .safetensors_ultrafuser import read_headers, weight_files
from .specialist_config_ultrafuser import own_config
from .specialists_ultrafuser import BASE
from .tokenizer_ultrafuser import load_tokenizer, tokenizer_notes, widest_usable_tokenizer


def fuse_specialists(
    cls: type[PreTrainedModel],
    specialists: dict[str, str | os.PathLike | PreTrainedModel],
    *,
    gate: str = DEFAULT_GATE,
    fusion: str = "logits",
    dtype: str | torch.dtype = "auto",
    gate_hidden_size: int | None = None,
    gate_temperature: float = 1.0,
    gate_calibration: bool | None = None,
    gate_switch_probability: float | None = None,
    revisions: dict[str, str] | None = None,
    device_map=None,
    attn_implementation: str | None = None,
    base: str | os.PathLike | None = None,
    **hub_kwargs,
) -> PreTrainedModel:
    """Builds a fused model out of specialists. Reached as `UltraFuserForCausalLM.from_specialists`.

    Everything that can be told from configurations and tokenizers is checked before any weight is loaded. Then one
    specialist at a time is loaded, run once on a short input, and refused if its backbone and head, rebuilt as parts
    of the fused model, do not give its own logits.

    Args:
        specialists: Name to Hub id, local folder or model in memory, in the order of the gate's columns. Models in
            memory are copied. For multimodal checkpoints the text part is taken. LoRA adapters of one base, as PEFT
            saves them, are fused on that base, which is loaded once; one of the specialists may be the base itself.
        gate: A name in `GATES`, or a word that says more, see `gate_settings`: "mlp" is the paper's. A new gate gives every
            specialist the same weight.
        fusion: "logits" or "probabilities".
        dtype: Of the specialists and the head. "auto" takes what all specialists share; required if they differ.
        gate_hidden_size: Width of the hidden layer of a gate that has one. Default: what `gate` says, or else 512.
        gate_temperature: Divides the gate's scores before the softmax.
        gate_calibration: Whether the gate also predicts temperatures, token by token. Default: what `gate` says.
        gate_switch_probability: Of the "posterior" gate, see `UltraFuserConfig`.
        revisions: Name to branch, tag or commit of its Hub repository. Pin commits for results to be repeatable.
        device_map: Where the fused model goes, as for `from_pretrained`.
        attn_implementation: As for `from_pretrained`; reaches every specialist.
        base: Where the base of specialists that are adapters is, if it is not where they say: its plain weights instead
            of quantised ones, or its new place.
        **hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for `from_pretrained`.

    Returns:
        The fused model in evaluation mode, with a generation configuration merged from the specialists'.

    Raises:
        ValueError: If the specialists cannot be fused, with the rule, what came, and the way out.
        OSError: If a specialist cannot be found or read.
    """
    unknown = set(hub_kwargs) - {"token", "cache_dir", "local_files_only"}
    if unknown:
        raise TypeError(f"from_specialists() got unknown arguments {sorted(unknown)}.")
    if not isinstance(specialists, dict):
        raise TypeError(f"`specialists` must map a name to each specialist, but got {type(specialists).__name__}.")
    names = list(specialists)
    hub = {name: {**hub_kwargs, "revision": (revisions or {}).get(name) or "main"} for name in names}
    if set(revisions or {}) - set(names):
        raise ValueError(f"`revisions` names {sorted(set(revisions) - set(names))}, but specialists are {names}.")
    given = {"gate_hidden_size": gate_hidden_size, "gate_calibration": gate_calibration}
    choices = {
        **gate_settings(gate),
        **{field: value for field, value in given.items() if value is not None},
        "gate_temperature": gate_temperature,
        "gate_switch_probability": gate_switch_probability,
        "fusion": fusion,
    }
    if not names:
        raise ValueError("Fusing needs at least two specialists, but got none. Pass {'text': ..., 'code': ...}.")
    # names, their number and the choices are refused before anything is read
    UltraFuserConfig(specialist_names=names, specialists=[_PLACEHOLDER] * len(names), **choices)

    adapters, whole, place = read_adapters(specialists, hub, base), specialists, hub
    if adapters is not None:
        whole, place = {BASE: adapters.base}, {BASE: {**hub_kwargs, "revision": adapters.revision}}
    with nullcontext() if adapters is None else about_base(adapters):
        sources = {name: own_config(name, s, **place[name]) for name, s in whole.items()}
    text_configs = {name: copy.deepcopy(c.get_text_config(decoder=True)) for name, c in sources.items()}
    for name, config in text_configs.items():
        check_architecture(name, sources[name], config)
        if not isinstance(whole[name], PreTrainedModel):
            auto_class(name, sources[name])
    vocab_size = min(spoken_rows(c) for c in text_configs.values())
    dtype = common_dtype(whole, sources) if dtype == "auto" else as_dtype(dtype)
    for name, config in text_configs.items():
        if config.vocab_size > vocab_size:
            print_line(
                f"{name}: {config.vocab_size} vocabulary rows cut to {vocab_size}, the smallest vocabulary among the "
                f"specialists; the {config.vocab_size - vocab_size} rows beyond it are dropped."
            )
        if getattr(config, "output_router_logits", False):
            print_line(f"{name}: {NO_ROUTER_LOSS}")
        config.vocab_size = vocab_size
        if (getattr(config, "pad_token_id", None) or 0) >= vocab_size:
            config.pad_token_id = None
    configs = list(text_configs.values())
    if adapters is not None:
        parts = read_parts(adapters, specialists, hub, _adaptable(sources[BASE], configs[0]))
        configs, choices["adapters"] = configs * len(names), layout(parts)
    config = UltraFuserConfig(specialist_names=names, specialists=configs, **choices)
    check_saving(config)
    check_steps(config)
    check_names(config)
    tokenizers = {
        n: load_tokenizer(s, base, **hub[n]) for n, s in specialists.items() if not isinstance(s, PreTrainedModel)
    }
    for name in [n for n, t in tokenizers.items() if t is None]:
        print_line(f"{name}: its folder holds no tokenizer, so nothing checks that its token ids mean the same.")
        del tokenizers[name]
    # one alone has none to agree with; whether it fits the rows matters only if no other does
    if len(tokenizers) > 1:
        chosen = widest_usable_tokenizer(tokenizers, vocab_size)
        for note in tokenizer_notes(tokenizers, vocab_size, chosen):
            print_line(note)
    generation_config = merged_generation_config(
        {n: own_generation_config(s, sources[n], **place[n]) for n, s in whole.items()}, vocab_size
    )

    state, head, column = {}, None, 0
    for k, (name, source) in enumerate(whole.items()):
        model = _load(name, source, sources[name], dtype, **place[name])
        if dtype is None:
            dtype = model.dtype
        elif model.dtype != dtype:
            raise ValueError(DTYPE_RULE.format({name: model.dtype, "the others": dtype}))
        check_head_dtype(name, config.specialists[k], backbone_class(config.specialists[k]), dtype)
        backbone_state, columns = _probe(name, model, config, k, text_configs[name])
        if head is None:
            head = torch.empty(vocab_size, config.hidden_size, dtype=dtype)
        head[:, column : column + columns.shape[1]] = columns
        column += columns.shape[1]
        if adapters is not None:
            with torch.device("meta"):
                adapted = cls(config).model.specialists[BASE]
            backbone_state = adapted_state(adapted, backbone_state, parts)
        # a model in memory stays its owner's: training the fused one must not change it
        own = isinstance(source, PreTrainedModel)
        state |= {f"model.specialists.{name}.{key}": t.clone() if own else t for key, t in backbone_state.items()}
        # the columns are a view of the whole head, which must not stay while the next specialist is loaded
        del model, columns
    state["lm_head.weight"] = head
    new_gate = GATES[config.gate](config)
    new_gate.init_weights()
    state |= {f"model.fusion_gate.{key}": t for key, t in new_gate.state_dict().items()}

    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, field, getattr(generation_config, field))
    config.dtype = dtype
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map=device_map, output_loading_info=True, **extra
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The fused model must hold exactly its specialists' tensors, but {sorted(info['missing_keys'])[:3]} are "
            f"missing and {sorted(info['unexpected_keys'])[:3]} have no place. This is a defect: please report the "
            f"specialists' architectures {[c.model_type for c in config.specialists]}."
        )
    model.generation_config = generation_config
    model.eval()
    # what a device map has left on the disk cannot be merged
    if not any(p.is_meta for p in model.parameters()):
        model.model.reader.probe(_tolerance(dtype))
    return model


def _adaptable(config: PreTrainedConfig, text_config: PreTrainedConfig) -> dict[str, tuple[str, torch.Size]]:
    """Linear layers of a base that adapters can be on, from its configuration."""
    return adaptable(empty_model(BASE, config), backbone_class(text_config))


_PLACEHOLDER = AutoConfig.for_model("llama")


def _load(name: str, source, config: PreTrainedConfig, dtype: torch.dtype | None, **hub) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        cast = any(b.is_floating_point() and b.element_size() < 4 for b in source.buffers())
        if dtype in (None, source.dtype) and not cast:
            return source
        # loading keeps in float32 what `.to(dtype)` would round, or has rounded, such as rotary frequencies
        with _no_bars():
            loaded = type(source).from_pretrained(
                None, config=copy.deepcopy(config), state_dict=source.state_dict(), dtype=dtype or source.dtype
            )
        loaded.generation_config = source.generation_config
        return loaded.to(source.device)
    dtype = "auto" if dtype is None else dtype
    if is_gguf(source):
        # no type is written in it that all its weights have
        dtype = torch.float32 if dtype == "auto" else dtype
        check_gguf_weights(name, os.fspath(source), config)
        folder, file = gguf_arguments(source)
        with in_words(f"The specialist {name!r}", source):
            model, info = auto_class(name, config).from_pretrained(
                folder, **file, **dequantised(), dtype=dtype, output_loading_info=True
            )
        odd = (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        refuse_other_tensors(f"{name!r} ({os.fspath(source)!r})", *odd)
        model.config = config
        return model
    files = weight_files(source, **hub)
    if files is None:
        raise OSError(
            f"The weights of {name!r} could not be read from {os.fspath(source)!r}. Only the safetensors format is "
            f"read, because others can run code; load and save the model once to convert it."
        )
    check_weights(name, config, read_headers(files))
    with in_words(f"The specialist {name!r}", source):
        return auto_class(name, config).from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, **hub
        )


@contextmanager
def _no_bars():
    """For what moves tensors within memory and is over at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _probe(
    name: str, model: PreTrainedModel, fused: UltraFuserConfig, k: int, text_config: PreTrainedConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Rebuilds a specialist from its configuration and checks that it speaks as before, with and without a cache.

    Some architectures do more between backbone and logits than multiplying by a head: whatever it is, it shows here.

    Args:
        name: Of the specialist.
        model: The specialist as its own causal language model.
        fused: Configuration of the fused model, with the fused vocabulary.
        k: Which of its specialists this is.
        text_config: The specialist's own configuration, with its own scale factors.

    Returns:
        The backbone's tensors by name, and the specialist's columns of the wide head, scale folded in.
        Shape (vocab, hidden).
    """
    config = fused.specialists[k]
    rows = config.vocab_size
    backbone, head = parts_of(name, model, config)
    columns = head.weight[:rows]
    state = dict(backbone.state_dict())
    embedding = backbone.get_input_embeddings().weight
    for key, tensor in state.items():
        if tensor.data_ptr() == embedding.data_ptr() and tensor.shape == embedding.shape:
            state[key] = tensor[:rows]
    refusal = (
        f"{name!r} ({type(model).__name__}) does something between its backbone and its logits that one linear head "
        f"cannot do, so the fused model would not speak as it does"
    )

    odd = next((n for n, p in model.named_parameters() if not _is_finite(p)), None)
    if odd is not None:
        raise ValueError(
            f"A specialist's weights must be finite numbers, because one that is not makes all that it is added to "
            f"meaningless, but `{odd}` of {name!r} holds others. Download it again, or leave it out."
        )
    was_training = model.training
    model.eval()
    ids = (torch.arange(1, 17, device=model.device) * 7919 % rows)[None]
    with in_words(f"The configuration of {name!r}", model.name_or_path):
        own = model(input_ids=ids, use_cache=False, return_dict=True).logits[..., :rows].float()
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=-1)
        if not own.isfinite().all():
            raise ValueError(
                f"A specialist must speak in finite numbers, but on a probe {name!r} gives others. Its config.json is not the "
                f"one that it was trained with, or its weights are damaged: download both again."
            )
        changed = model(input_ids=other, use_cache=False, return_dict=True).logits[..., :rows].float()
    if not torch.allclose(own[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-3 * own.abs().max().item()):
        raise ValueError(
            f"A specialist must be a decoder, which predicts each token from those before it, but in {name!r} "
            f"({type(model).__name__}) a later token changes an earlier prediction. Use a causal language model."
        )
    try:
        with _no_bars():
            rebuilt = type(backbone).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype).eval()
    except RuntimeError as error:
        raise ValueError(
            f"A specialist must be what its configuration says, but {name!r} ({type(model).__name__}) has tensors of "
            f"other shapes in its backbone. It cannot be fused."
        ) from error
    rebuilt.to(model.device)
    hidden = rebuilt(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    linear = F.linear(hidden, columns).float()
    tolerance = _tolerance(model.dtype)
    cap = soft_cap(text_config)

    def head_of(linear: Tensor, scale: float) -> Tensor:
        return linear * scale if cap is None else cap * torch.tanh(linear * scale / cap)

    def alike(logits: Tensor, expected: Tensor) -> bool:
        return bool((logits - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))

    scale = next((s for s in _scales(text_config) if alike(head_of(linear, s), own)), None)
    if scale is None:
        difference = (linear - own).abs().max().item()
        raise ValueError(f"{refusal}: on a probe, logits differ by up to {difference:.3g}. It cannot be fused.")

    for kind in (DynamicCache, StaticCache):
        expected = step_alone(kind, model, ids)
        if expected is None and kind is StaticCache:
            continue
        # with a cache of its family's own it says what it says without
        expected = own[:, -1] if expected is None else expected[..., :rows].float()
        step = step_within(kind, rebuilt, name, fused, k, ids)
        if not alike(head_of(F.linear(step, columns).float(), scale), expected):
            raise ValueError(
                f"{name!r} ({type(model).__name__}) says something else in a step of generation with the "
                f"{kind.__name__} that all specialists share than alone. It cannot be fused."
            )
    model.train(was_training)
    return {k: t.cpu() for k, t in state.items()}, (columns if scale == 1.0 else columns * scale).cpu()


def _is_finite(weight: Tensor) -> bool:
    # without a copy of its size
    return weight.numel() == 0 or all(torch.isfinite(end) for end in torch.aminmax(weight.detach()))


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-4, torch.float64: 1e-6}.get(dtype, 2e-2)


def _scales(config: PreTrainedConfig) -> list[float]:
    """Factors that the logits may have been multiplied by: 1, and what the family writes down, either way up."""
    written = [getattr(config, field, None) for field in SCALE_FIELDS]
    return [1.0] + [s for w in written if w for s in (1 / w, w)]
