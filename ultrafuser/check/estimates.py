"""Estimates the cost of a fused model from its specialists' configurations: disk, memory, cache, time, training."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.architecture_ultrafuser import backbone_class
from modeling_ultrafuser.families_ultrafuser import (
    CACHED_LAYERS,
    heads_of,
    specialist_layer_types,
)
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.lora_ultrafuser import adaptable
from modeling_ultrafuser.readers_ultrafuser import reader_of


# float32: a number, its gradient, and AdamW's two moments
TRAINED = 4 * 4
LORA_RANK = 16


@dataclass
class Size:
    """Parameters of one specialist inside the fused model.

    Attributes:
        backbone: All but its head.
        embedding: The part of the backbone that is looked up, a row per token, and not multiplied by.
        head: Its columns of the wide head.
        adapter: LoRA of rank 16 on all linear layers of its backbone.
        tied: Whether embedding and head are one tensor in its own files.
    """

    backbone: int
    embedding: int
    head: int
    adapter: int
    tied: bool


def size(model: PreTrainedModel, config, rows: int) -> Size:
    """A specialist's size once it is a part of the fused model.

    Args:
        model: With its own head; on the meta device is enough.
        config: Of its text part.
        rows: Of the fused vocabulary.
    """
    backbone = next(m for m in model.modules() if type(m) is backbone_class(config))
    own_rows, hidden = backbone.get_input_embeddings().weight.shape
    linear = (m for m in backbone.modules() if isinstance(m, nn.Linear))
    return Size(
        backbone=sum(p.numel() for p in backbone.parameters()) - (own_rows - rows) * hidden,
        embedding=rows * hidden,
        head=rows * config.hidden_size,
        adapter=LORA_RANK * sum(m.in_features + m.out_features for m in linear),
        tied=bool(getattr(model.config, "tie_word_embeddings", False)),
    )


def part_sizes(config: UltraFuserConfig, model: PreTrainedModel, sizes: dict[str, Size]) -> dict[str, Size]:
    """Returns the size of each part of the fused model but its gate: specialists, or a base and adapters of it.

    Args:
        config: Configuration of the fused model.
        model: The first specialist, or the base; on the meta device is enough.
        sizes: What `size` returns for each specialist, or for the base, by the specialists' names.
    """
    layers = adaptable(model, backbone_class(config.specialists[0])).values()
    return reader_of(config).sizes(config, sizes, {layer.name: layer.shape for layer in layers})


def estimate(config: UltraFuserConfig, sizes: dict[str, Size], dtype: torch.dtype, download: int = 0) -> dict:
    """Bytes that the fused model takes, activations not counted.

    - weights: parameters of backbones and heads times the size of a number; the gate's are float32. A head that was
      tied to its embedding is stored beside it: that is what untying costs.
    - cache: 2 x key-value heads x head width x size of a number, for each attention layer and token. Layers with a
      window stop growing there. Left out (None) for latent attention and for layers without keys and values.
    - cost of a token: parameters that are multiplied by, all but the embeddings, relative to the largest specialist.
      The experts of a mixture count as if all were used.
    - gate: the weights, and for each number of the gate four in float32: itself, gradient, AdamW's two moments.
    - joint: those four for every parameter.
    - joint with LoRA: the weights, and those four for each number of the gate and of adapters of rank 16 on all linear
      layers of the backbones.

    Where specialists are adapters of one base, each token is read in a row for each, so that the cost of a token holds
    while reading the weights is what takes time; "rows" says how many products there are to each weight. The joint stage
    trains adapters and gate.

    Args:
        config: Of the fused model.
        sizes: Of each specialist, by name; or what `part_sizes` returns.
        dtype: Of the specialists and the head.
        download: Bytes that are not on this machine yet.
    """
    with torch.device("meta"):
        gate = sum(p.numel() for p in GATES[config.gate](config).parameters())
    numbers = sum(s.backbone + s.head for s in sizes.values())
    used = {name: s.backbone - s.embedding + s.head for name, s in sizes.items()}
    largest = max(used, key=used.get)
    weights = numbers * dtype.itemsize + 4 * gate
    adapters = sum(s.adapter for s in sizes.values())
    cost = {"of": largest, "times": round((sum(used.values()) + gate) / used[largest], 2)}
    reader = reader_of(config)
    frozen = reader.frozen(sizes)
    training = {
        "gate": weights + (TRAINED - 4) * gate,
        "joint": frozen * dtype.itemsize + TRAINED * (numbers - frozen + gate),
    }
    if reader.one_by_one:
        training["joint with LoRA"] = weights + (TRAINED - 4) * gate + TRAINED * adapters
    else:
        cost["rows"] = len(config.specialists)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "parameters": {name: s.backbone + s.head for name, s in sizes.items()} | {"gate": gate},
        "download": download,
        "disk": weights,
        "memory": {name: numbers * getattr(torch, name).itemsize + 4 * gate for name in ("bfloat16", "float32")},
        "untying": {name: s.head * dtype.itemsize for name, s in sizes.items() if s.tied},
        "cache_per_token": _cache(config, dtype),
        "cost_per_token": cost,
        "training": training,
    }


def _cache(config: UltraFuserConfig, dtype: torch.dtype) -> int | None:
    total = 0
    for c in config.specialists:
        types = specialist_layer_types(c)
        if getattr(c, "kv_lora_rank", None) or getattr(c, "kv_sharing_modes", None) or set(types) - CACHED_LAYERS:
            return None
        heads = heads_of(c)
        total += 2 * len(types) * heads.num_key_value_heads * heads.head_dim
    return total * dtype.itemsize
