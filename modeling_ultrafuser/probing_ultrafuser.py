"""A step of generation with a cache, of a specialist alone and within a fused model: both must come to the same."""

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .architecture_ultrafuser import empty_backbones
from .cache_ultrafuser import SpecialistCache, paged_record
from .causal_ultrafuser import masks_for_generate
from .configuration_ultrafuser import UltraFuserConfig
from .families_ultrafuser import specialist_layer_types
from .inputs_ultrafuser import Tokens
from .reader_separate_ultrafuser import named_masks, read_within
from .versions_ultrafuser import CACHE


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
        attention, record = backbone.config._attn_implementation, paged_record()
        backbone.set_attn_implementation("sdpa" if attention == "sdpa" else "paged|eager")
        try:
            for start, end in ((0, 3), (3, 5)):
                mask = torch.zeros((1, 1, end - start, end), dtype=backbone.dtype, device=backbone.device)
                positions = torch.arange(start, end, device=backbone.device)[None]
                tokens = Tokens(positions, dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask, positions)
                layers = [0, backbone.config.num_hidden_layers]
                more = {"max_length_k": end} if record.changes_kwargs else {}
                read_within(backbone, name, layers, tokens, None, cache=record, use_cache=False, **more)
            odd = _not_as_paged(record.written, layers[1], config)
        except Exception as error:
            odd = f"ends in {type(error).__name__}: {' '.join(str(error).split())[:200].removesuffix('.')}"
        finally:
            backbone.set_attn_implementation(attention)
        if odd:
            raise ValueError(
                f"Continuous batching keeps keys and values in pages, into which attention of every layer must put those of "
                f"each token once, but {name!r} ({backbone.config.model_type!r}) {odd}. Use `generate` for this model."
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
                own = SpecialistCache(cache, layers[0], layers[1] - layers[0])
                mask = masks_for_generate(backbone)(backbone.config, embeds, mask, own, position_ids=positions)
                mask = named_masks(name, mask)
            tokens = Tokens(ids[:, begin:end], mask, positions)
            output = read_within(backbone, name, layers, tokens, cache, use_cache=True)
    except Exception as error:
        raise ValueError(
            f"A specialist must generate with the cache that all specialists share, but {name!r} "
            f"({backbone.config.model_type!r}) cannot with a {kind.__name__}: {type(error).__name__}: {error} "
            f"It cannot be fused."
        ) from error
    return output.last_hidden_state[:, -1]


def _cache(kind: type[Cache], config, length: int) -> Cache:
    return kind(config=config) if kind is DynamicCache else kind(config=config, max_cache_len=length)
