"""Reads the configurations of all families under their several names: heads, widths, types of layers, soft caps."""

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedConfig


# layers that keep keys and values of every token, or of those in a window, and nothing else
CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# fields that bound how far layers look back, and the type of those layers
WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}

# families that multiply or divide their logits by one number keep it here (Granite, Cohere, Falcon-H1, Inkling, ...)
SCALE_FIELDS = (
    *("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier"),
    "logits_mup_width_multiplier",
)


def spoken_rows(config: PreTrainedConfig) -> int:
    """Counts the tokens that a specialist gives logits to; some pad their vocabulary beyond that."""
    return min(config.vocab_size, getattr(config, "unpadded_vocab_size", None) or config.vocab_size)


def specialist_layer_types(config: PreTrainedConfig) -> list[str]:
    """Type of each layer of a specialist, made up where its family (such as Mistral) does not write them down."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return list(layer_types)
    bounded_by = (layer_type for field, layer_type in WINDOWS.items() if getattr(config, field, None) is not None)
    return [next(bounded_by, "full_attention")] * config.num_hidden_layers


def soft_cap(config: PreTrainedConfig) -> float | None:
    """The value that bounds a specialist's logits as `cap * tanh(logits / cap)`, or None."""
    return getattr(config, "final_logit_softcapping", None)


def bounded(logits, cap: float | None):
    """Logits under a soft cap, if there is one."""
    return logits if cap is None else cap * (logits / cap).tanh()


def common(values):
    """The value that all share, or None."""
    values = list(values)
    return values[0] if all(v == values[0] for v in values) else None


def side_by_side(widths: Iterable[int]) -> list[slice]:
    """Returns the columns of parts of these widths that lie side by side."""
    return [slice(*edges) for edges in pairwise(accumulate(widths, initial=0))]


def of_each_layer(config: PreTrainedConfig, read: Callable[[PreTrainedConfig], Any]) -> list:
    """Reads a configuration; or that of each layer, where they differ, as Gemma 4's do."""
    try:
        return [read(config)]
    except RuntimeError:  # how transformers refuses to say one thing of layers that differ
        return [read(layer) for layer in config.per_layer_config]


def of_each(config, read: Callable[[PreTrainedConfig], Any]) -> dict[str, Any]:
    """Returns what is read of the configuration of each of a fused model's specialists, by name."""
    return {name: read(c) for name, c in zip(config.specialist_names, config.specialists, strict=True)}


def field_of(config: PreTrainedConfig, name: str):
    """Reads a field, None where it is absent or layers differ."""
    return common(of_each_layer(config, lambda c: getattr(c, name, None)))


class Heads(NamedTuple):
    """Heads of each layer, and the width of one. None where layers differ."""

    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None


def heads_of(config: PreTrainedConfig) -> Heads:
    """Reads the heads of each layer, whether or not the family writes all of it down."""

    def read(c: PreTrainedConfig) -> Heads:
        number = getattr(c, "num_attention_heads", None)
        width = getattr(c, "head_dim", None) or (c.hidden_size // number if number else None)
        return Heads(number, getattr(c, "num_key_value_heads", None) or number, width)

    return Heads(*map(common, zip(*of_each_layer(config, read), strict=True)))


def intermediate_size(config: PreTrainedConfig) -> int:
    """Width of a block's hidden layer, the widest where layers differ."""
    size = field_of(config, "intermediate_size") or getattr(config, "n_inner", None) or 4 * config.hidden_size
    # Gemma 3n writes one for each layer
    return max(size) if isinstance(size, list | tuple) else size


def plain_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns what a configuration says of the model, without where it came from."""
    output = config.to_dict()
    for key in ("transformers_version", "_name_or_path"):
        output.pop(key, None)
    return output
