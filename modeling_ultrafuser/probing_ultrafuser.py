"""Probes of a specialist: alone, rebuilt as a part of a fused model, and in a step of generation with the shared cache."""

import inspect

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from .architecture_ultrafuser import empty_backbones, parts_of
from .cache_ultrafuser import PagedRecord, SpecialistCache
from .compat_ultrafuser import CACHE, PAGES_CHANGE_KWARGS, attention_of
from .configuration_ultrafuser import UltraFuserConfig
from .families_ultrafuser import SCALE_FIELDS, bounded, soft_cap, specialist_layer_types
from .files_ultrafuser import in_words
from .inputs_ultrafuser import Tokens
from .log_ultrafuser import no_bars
from .reader_separate_ultrafuser import named_masks, read_within
from .refusals_ultrafuser import Refusal


def check_steps(config: UltraFuserConfig) -> None:
    """Refuses specialists that cannot take a step with the cache that all share, as far as that shows without weights.

    Raises:
        ValueError: Naming the first such specialist and what it says.
    """
    for k, (name, backbone) in enumerate(zip(config.specialist_names, empty_backbones(config), strict=False)):
        with torch.device("meta"):
            ids = torch.zeros((1, 4), dtype=torch.long)
            try:
                step_within(DynamicCache, backbone.eval(), name, config, k, ids)
            except ValueError as error:
                # what depends on numbers is left to the probe
                faults = ValueError | TypeError | AttributeError | KeyError | IndexError
                if isinstance(error.__cause__, faults) and "meta" not in str(error):
                    raise


@torch.no_grad()
def check_pages(config: UltraFuserConfig, specialists: dict[str, PreTrainedModel]) -> None:
    """Refuses specialists whose attention does not use the paged cache of continuous batching.

    The library asks no family whether it does. One that does not answers as if every token were the first, or not at all.

    Args:
        config: Of the fused model.
        specialists: Backbones by name.

    Raises:
        ValueError: Naming the first such specialist and what it does instead.
    """
    # masks by kind of layer, as the library makes them for all specialists
    kinds = {kind for c in config.specialists for kind in specialist_layer_types(c)}
    for name, backbone in specialists.items():
        attention, record = attention_of(backbone.config), PagedRecord()
        backbone.set_attn_implementation("sdpa" if attention == "sdpa" else "paged|eager")
        try:
            for start, end in ((0, 3), (3, 5)):
                mask = torch.zeros((1, 1, end - start, end), dtype=backbone.dtype, device=backbone.device)
                positions = torch.arange(start, end, device=backbone.device)[None]
                tokens = Tokens(positions, dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask, positions)
                layers = [0, backbone.config.num_hidden_layers]
                more = {"max_length_k": end} if PAGES_CHANGE_KWARGS else {}
                read_within(backbone, name, layers, tokens, None, cache=record, use_cache=False, **more)
            odd = _not_as_paged(record.written, layers[1], config)
        except Exception as error:
            odd = f"ends in {type(error).__name__}: {' '.join(str(error).split())[:200].removesuffix('.')}"
        finally:
            backbone.set_attn_implementation(attention)
        if odd:
            raise Refusal(
                f"{name!r} ({backbone.config.model_type!r}) {odd}",
                "Continuous batching keeps keys and values in pages, into which attention of every layer must "
                "put those of each token once",
                "Use `generate` for this model.",
                about="architecture",
            )


def _not_as_paged(written: dict[int, list], layers: int, config: UltraFuserConfig) -> str | None:
    missing = [layer for layer in range(layers) if layer not in written]
    if missing:
        return f"puts in none in its layers {missing[:3]}"
    for layer, steps in written.items():
        if len(steps) != 2:
            return f"puts them in {len(steps) / 2:g} times in its layer {layer}"
        shapes = [(states.shape[1], states.shape[-1]) for states in steps[0]]
        if shapes != [(config.num_key_value_heads, config.head_dim)] * 2:
            (keys, wide), (values, deep) = shapes
            return (
                f"puts in keys of {keys} x {wide} and values of {values} x {deep} numbers where there is room for "
                f"{config.num_key_value_heads} x {config.head_dim} of each"
            )
    return None


def step_alone(kind: type[Cache], model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Logits of the last token, read after the others are in a cache, as generation does it.

    Args:
        kind: Of the cache.
        model: A causal language model.
        ids: The text. Shape (1, seq).

    Returns:
        Shape (1, vocab); None if the model does not run in this way.
    """
    length, mask = ids.shape[1], torch.ones_like(ids)
    takes = inspect.signature(model.forward).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    try:
        cache = _cache(kind, model.config, length)
        for end, new in ((length - 1, None), (length, 1)):
            inputs = model.prepare_inputs_for_generation(
                ids[:, :end],
                next_sequence_length=new,
                **{CACHE: cache},
                attention_mask=mask[:, :end],
                position_ids=mask[:, :end].cumsum(-1) - 1,
                is_first_iteration=new is None,
                use_cache=True,
            )
            inputs = {key: value for key, value in inputs.items() if everything or key in takes}
            logits = model(**inputs | {"return_dict": True}).logits
    except Exception:  # whatever keeps it from running alone is not what fusing does to it
        return None
    return logits[:, -1] if logits.isfinite().all() else None


def step_within(
    kind: type[Cache], backbone: PreTrainedModel, name: str, fused: UltraFuserConfig, k: int, ids: Tensor
) -> Tensor:
    """The same of a specialist's backbone with its part of a fused model's cache: its last hidden state.

    Args:
        kind: Of the cache.
        backbone: Of the specialist.
        name: Of the specialist.
        fused: Configuration of the fused model.
        k: Which of its specialists this is.
        ids: The text. Shape (1, seq).

    Raises:
        ValueError: If it does not run.
    """
    start = sum(c.num_hidden_layers for c in fused.backbones[:k])
    layers = [start, start + backbone.config.num_hidden_layers]
    length = ids.shape[1]
    try:
        cache = _cache(kind, fused, length)
        for begin, end in ((0, length - 1), (length - 1, length)):
            mask, positions = torch.ones_like(ids[:, :end]), torch.arange(begin, end, device=ids.device)[None]
            if cache.is_compileable:
                embeds = torch.empty((1, end - begin, 0), dtype=backbone.dtype, device=ids.device)
                own = SpecialistCache(cache, *layers)
                mask = named_masks(backbone, name, embeds, mask, own, position_ids=positions)
            tokens = Tokens(ids[:, begin:end], mask, positions)
            output = read_within(backbone, name, layers, tokens, cache, use_cache=True)
    except Exception as error:
        raise Refusal(
            f"{name!r} ({backbone.config.model_type!r}) cannot generate with a {kind.__name__}: {type(error).__name__}: {error}",
            "A specialist must generate with the cache that all specialists share",
            "It cannot be fused.",
            about="architecture",
        ) from error
    return output.last_hidden_state[:, -1]


def _cache(kind: type[Cache], config, length: int) -> Cache:
    return kind(config=config) if kind is DynamicCache else kind(config=config, max_cache_len=length)


@torch.no_grad()
def probe_specialist(
    name: str, model: PreTrainedModel, fused: UltraFuserConfig, k: int, text_config: PreTrainedConfig
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Rebuilds a specialist from its configuration and checks that it speaks as before, with and without a cache.

    Some architectures do more between backbone and logits than multiplying by a head: whatever it is, it shows here.

    Args:
        name: Of the specialist.
        model: The specialist as its own causal language model.
        fused: Configuration of the fused model, with the fused vocabulary.
        k: Which of its specialists this is.
        text_config: The specialist's own configuration, with its own scale factors.

    Returns:
        The backbone's tensors by name; the specialist's columns of the wide head, scale folded in, of shape
        (vocab, hidden); and that scale.
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
    odd = next((n for n, p in model.named_parameters() if not _is_finite(p)), None)
    if odd is not None:
        raise Refusal(
            f"`{odd}` of {name!r} holds numbers that are not finite",
            "A specialist's weights must be finite numbers, because one that is not makes all that it is added "
            "to meaningless",
            "Download it again, or leave it out.",
        )
    was_training = model.training
    model.eval()
    ids = (torch.arange(1, 17, device=model.device) * 7919 % rows)[None]
    with in_words(f"The configuration of {name!r}", model.name_or_path):
        own = model(input_ids=ids, use_cache=False, return_dict=True).logits[..., :rows].float()
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=-1)
        if not own.isfinite().all():
            raise Refusal(
                f"on a probe {name!r} gives numbers that are not finite",
                "A specialist must speak in finite numbers",
                "Its config.json is not the one that it was trained with, or its weights are damaged: download "
                "both again.",
            )
        changed = model(input_ids=other, use_cache=False, return_dict=True).logits[..., :rows].float()
    if not torch.allclose(own[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-3 * own.abs().max().item()):
        raise Refusal(
            f"in {name!r} ({type(model).__name__}) a later token changes an earlier prediction",
            "A specialist must be a decoder, which predicts each token from those before it",
            "Use a causal language model.",
        )
    try:
        with no_bars():
            rebuilt = type(backbone).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype).eval()
    except RuntimeError as error:
        raise Refusal(
            f"{name!r} ({type(model).__name__}) has tensors of other shapes in its backbone",
            "A specialist must be what its configuration says",
            "It cannot be fused.",
        ) from error
    rebuilt.to(model.device)
    hidden = rebuilt(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    linear = F.linear(hidden, columns).float()
    allowed = tolerance(model.dtype)
    cap = soft_cap(text_config)

    def alike(logits: Tensor, expected: Tensor) -> bool:
        return bool((logits - expected).abs().max() <= allowed * expected.abs().max().clamp(min=1e-6))

    scale = next((s for s in _scales(text_config) if alike(bounded(linear * s, cap), own)), None)
    if scale is None:
        difference = (linear - own).abs().max().item()
        raise Refusal(
            f"{name!r} ({type(model).__name__}) does something between its backbone and its logits that one linear head "
            f"cannot do: on a probe, logits differ by up to {difference:.3g}",
            "The fused model would not speak as it does",
            "It cannot be fused.",
        )

    for kind in (DynamicCache, StaticCache):
        expected = step_alone(kind, model, ids)
        if expected is None and kind is StaticCache:
            continue
        # with a cache of its family's own it says what it says without
        expected = own[:, -1] if expected is None else expected[..., :rows].float()
        step = step_within(kind, rebuilt, name, fused, k, ids)
        if not alike(bounded(F.linear(step, columns).float() * scale, cap), expected):
            raise Refusal(
                f"{name!r} ({type(model).__name__}) says something else in a step of generation with the {kind.__name__} "
                f"that all specialists share than alone",
                "",
                "It cannot be fused.",
            )
    model.train(was_training)
    return {k: t.cpu() for k, t in state.items()}, (columns if scale == 1.0 else columns * scale).cpu(), scale


def _is_finite(weight: Tensor) -> bool:
    # without a copy of its size
    return weight.numel() == 0 or all(torch.isfinite(end) for end in torch.aminmax(weight.detach()))


def tolerance(dtype: torch.dtype) -> float:
    """Returns by how much of the largest logit two computations of one thing may differ."""
    return {torch.float32: 1e-4, torch.float64: 1e-6}.get(dtype, 2e-2)


def _scales(config: PreTrainedConfig) -> list[float]:
    """Factors that the logits may have been multiplied by: 1, and what the family writes down, either way up."""
    written = [getattr(config, field, None) for field in SCALE_FIELDS]
    return [1.0] + [s for w in written if w for s in (1 / w, w)]
