"""Refusals of what engines that know one attention geometry for all layers would serve wrongly."""

from torch import nn
from transformers.cache_utils import Cache

from .carrying_ultrafuser import Carrier, find_head
from .causal_ultrafuser import switching_lengths
from .configuration_ultrafuser import UltraFuserConfig, attention_of_all
from .families_ultrafuser import common, head_dim, num_attention_heads, num_key_value_heads, specialist_layer_types
from .fusions_ultrafuser import FUSIONS, one_head_rules
from .gates_ultrafuser import GATES
from .readers_ultrafuser import reader_of


def check_servable_by_vllm(config: UltraFuserConfig) -> None:
    """Refuses what vLLM's Transformers backend would serve wrongly: it knows one attention geometry for all layers.

    Raises:
        ValueError: Naming the property that differs and its value for each specialist.
    """
    reader_of(config).check_engine(config, "vLLM's Transformers backend")
    _refuse_longrope(config, "vLLM's Transformers backend")

    def refuse(reason: str, values: list) -> None:
        raise ValueError(
            f"vLLM's Transformers backend {reason}, but it is {dict(zip(config.specialist_names, values, strict=True))}. "
            f"Use transformers for this model: `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`."
        )

    configs = config.specialists
    if not FUSIONS[config.fusion].one_head:
        rules = one_head_rules()
        refuse(f"computes logits with one linear head, which needs {rules}", [config.fusion] * len(configs))
    for field, read in (
        ("num_attention_heads", num_attention_heads),
        ("num_key_value_heads", num_key_value_heads),
        ("head_dim", head_dim),
    ):
        values = [read(c) for c in configs]
        if common(values) is None:
            refuse(f"knows one `{field}` for all specialists", values)
    windows = [c.sliding_window if "sliding_attention" in specialist_layer_types(c) else None for c in configs]
    if len({w for w in windows if w is not None}) > 1:
        refuse("knows one attention window for all specialists", windows)
    types = [sorted(set(specialist_layer_types(c)) - {"full_attention", "sliding_attention"}) for c in configs]
    if any(types):
        refuse("serves full and sliding attention only in a fused model; other layer types must be absent", types)
    for field, what in (
        ("attn_logit_softcapping", "knows one attention soft cap for all specialists; it must be None in each"),
        ("kv_lora_rank", "cannot mix latent attention (MLA) with others; `kv_lora_rank` must be absent"),
    ):
        values = [getattr(c, field, None) for c in configs]
        if any(v is not None for v in values):
            refuse(what, values)
    experts = [next((v for f in _EXPERT_FIELDS if (v := getattr(c, f, None))), None) for c in configs]
    if any(experts):
        refuse("cannot load mixture-of-experts specialists; the number of experts must be absent", experts)


def _refuse_longrope(config: UltraFuserConfig, engine: str) -> None:
    for name, specialist in zip(config.specialist_names, config.specialists, strict=True):
        beyond = [n for n in switching_lengths(specialist) if n < (config.max_position_embeddings or n + 1)]
        if beyond:
            raise ValueError(
                f"{engine} computes each key once, but all keys of {name!r} are rotated anew once a text is longer than "
                f"{beyond[0]} tokens, and it may be {config.max_position_embeddings}. Set `max_position_embeddings` of the "
                f"fused config.json to {beyond[0]}, or use `generate`."
            )


def _refuse_evidence(config: UltraFuserConfig, engine: str) -> None:
    if GATES[config.gate].reads_past:
        stateless = [name for name, gate in GATES.items() if not gate.reads_past]
        raise ValueError(
            f"{engine} keeps keys and values of each text and nothing else, but gate={config.gate!r} also carries from "
            f"token to token how well each specialist has predicted the text so far. Use `generate` for this model, or "
            f"another gate, one of {stateless}."
        )


_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def prepared_for_vllm(backbone: nn.Module) -> Carrier | None:
    """Numbers layers as vLLM looks them up, among those of all specialists; transformers counts each one's.

    Returns:
        What hands on evidence from token to token, if the gate reads the past.
    """
    for start, specialist in zip(backbone.reader.first_layers, backbone.specialists.values(), strict=False):
        for module in specialist.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx += start
    if not backbone.fusion_gate.reads_past:
        return None
    carrier = Carrier(backbone.config, backbone.fusion_gate.evidence)
    find_head(backbone)
    return carrier


def check_pageable(config: UltraFuserConfig) -> None:
    """Refuses what continuous batching (`generate_batch`) cannot keep: its cache knows one attention geometry.

    Raises:
        ValueError: Naming each specialist's geometry.
    """
    reader_of(config).check_engine(config, "Continuous batching")
    _refuse_longrope(config, "Continuous batching")
    _refuse_evidence(config, "Continuous batching")
    if attention_of_all(config) is None:
        own = {n: c._attn_implementation for n, c in zip(config.specialist_names, config.specialists, strict=True)}
        raise ValueError(
            f"Continuous batching puts one paged attention in place of that of all layers, but specialists attend by "
            f"{own}. Let all attend alike first: `model.set_attn_implementation('eager')`."
        )
    types = {
        n: set(specialist_layer_types(c)) for n, c in zip(config.specialist_names, config.specialists, strict=True)
    }
    used = set().union(*types.values())
    # these fields are absent where specialists differ
    one_shape = hasattr(config, "num_key_value_heads") and hasattr(config, "head_dim")
    one_window = "sliding_attention" not in used or hasattr(config, "sliding_window")
    if one_shape and one_window and used <= {"full_attention", "sliding_attention"}:
        return
    geometry = {
        name: {
            "layer_types": sorted(types[name]),
            "num_key_value_heads": num_key_value_heads(c),
            "num_attention_heads": num_attention_heads(c),
            "head_dim": head_dim(c),
            **({"sliding_window": c.sliding_window} if "sliding_attention" in types[name] else {}),
        }
        for name, c in zip(config.specialist_names, config.specialists, strict=True)
    }
    raise ValueError(
        f"Continuous batching keeps keys and values of all layers in blocks of one shape, of full attention and of "
        f"one attention window at most, but the specialists are {geometry}. Use `generate` for this model."
    )


def check_answered(prompts: int, answers: dict) -> None:
    """Refuses to pass off what continuous batching did not finish as its answers.

    Raises:
        RuntimeError: With the number of prompts without a whole answer, and what the first ended with.
    """
    failed = [a.error for a in answers.values() if a.error is not None]
    if failed or len(answers) < prompts:
        reason = failed[0] if failed else "its worker stopped"
        raise RuntimeError(
            f"Continuous batching failed for {len(failed) or prompts - len(answers)} of {max(prompts, len(answers))} prompts: "
            f"{str(reason).strip().removesuffix('.')}. Its answers would be cut short, so none are returned. Pass a "
            f"`continuous_batching_config` with more room if that is the reason, or use `generate`."
        )


def refuse_cache_of_one_shape(config: UltraFuserConfig, cache: Cache) -> None:
    """Refuses keys and values of one shape for all layers, as PEFT's prefix tuning makes them, where shapes differ.

    Raises:
        ValueError: Naming each specialist's geometry.
    """
    # these fields are absent where specialists differ
    if hasattr(config, "num_key_value_heads") and hasattr(config, "head_dim"):
        return
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    if any(k is None for k in keys) or common((k.shape[1], k.shape[3]) for k in keys if k.ndim == 4) is None:
        return
    geometry = {
        name: {"num_key_value_heads": num_key_value_heads(c), "head_dim": head_dim(c)}
        for name, c in zip(config.specialist_names, config.specialists, strict=True)
    }
    raise ValueError(
        f"Keys and values were given in one shape for all layers (prefix tuning does), {tuple(keys[0].shape)}, but those "
        f"of the specialists differ: {geometry}. Use LoRA, or prefix tuning on one specialist: `model.specialist(name)`."
    )
