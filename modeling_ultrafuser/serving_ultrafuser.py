"""Refusals of what engines that know one attention geometry for all layers would serve wrongly."""

from collections.abc import Iterator

from torch import nn

from .carrying_ultrafuser import Carrier, find_head
from .causal_ultrafuser import switching_lengths
from .compat_ultrafuser import VLLM, attention_of, number_layers
from .configuration_ultrafuser import UltraFuserConfig, attention_of_all
from .families_ultrafuser import (
    Heads,
    common,
    heads_of,
    of_each,
    specialist_layer_types,
)
from .fusions_ultrafuser import fusion_class, one_head_rules
from .gate_base_ultrafuser import Reads
from .gates_ultrafuser import GATES
from .readers_ultrafuser import reader_of


def check_servable(config: UltraFuserConfig, engine: str = VLLM) -> None:
    """Rejects what an engine's Transformers backend would serve wrongly: it knows one attention geometry for all layers.

    Args:
        config: Of the fused model.
        engine: Name of the engine's attention, see `engine_of`.

    Raises:
        ValueError: Naming the property that differs and its value for each specialist.
    """
    backend = "vLLM's Transformers backend" if engine == VLLM else f"The engine {engine!r}"
    _check_texts_end_to_end(config, backend)

    def refuse(reason: str, values: dict) -> None:
        raise ValueError(
            f"{backend} {reason}, but it is {values}. Use transformers for this model: "
            f"`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`."
        )

    if engine != VLLM and Reads.PAST in GATES[config.gate].reads:
        refuse("keeps no state of a gate that reads the past", of_each(config, lambda _: config.gate))
    if not fusion_class(config.fusion).one_head:
        rules = one_head_rules()
        refuse(f"computes logits with one linear head, which needs {rules}", of_each(config, lambda _: config.fusion))
    for reason, values in _differences(config, *Heads._fields):
        refuse(reason, values)
    for field, what in (
        ("attn_logit_softcapping", "knows one attention soft cap for all specialists; it must be None in each"),
        ("kv_lora_rank", "cannot mix latent attention (MLA) with others; `kv_lora_rank` must be absent"),
    ):
        values = of_each(config, lambda c, field=field: getattr(c, field, None))
        if set(values.values()) != {None}:
            refuse(what, values)
    experts = of_each(config, lambda c: next((v for f in EXPERTS if (v := getattr(c, f, None))), None))
    if any(experts.values()):
        refuse("cannot load mixture-of-experts specialists; the number of experts must be absent", experts)


# layers that engines serve
ATTENTION = {"full_attention", "sliding_attention"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _differences(config: UltraFuserConfig, *fields: str) -> Iterator[tuple[str, dict]]:
    """Yields what an engine knows once for all layers, where it is not so: in words, and each specialist's value."""
    heads = of_each(config, heads_of)
    for field in fields:
        values = {name: getattr(own, field) for name, own in heads.items()}
        if common(values.values()) is None:
            yield f"knows one `{field}` for all specialists", values
    windows = of_each(config, lambda c: c.sliding_window if "sliding_attention" in specialist_layer_types(c) else None)
    if len({*windows.values()} - {None}) > 1:
        yield "knows one attention window for all specialists", windows
    types = of_each(config, lambda c: sorted(set(specialist_layer_types(c)) - ATTENTION))
    if any(types.values()):
        yield "serves full and sliding attention only in a fused model; other layer types must be absent", types


def _check_texts_end_to_end(config: UltraFuserConfig, engine: str) -> None:
    reader_of(config).check_engine(config, engine)
    for name, specialist in zip(config.specialist_names, config.specialists, strict=True):
        beyond = [n for n in switching_lengths(specialist) if n < (config.max_position_embeddings or n + 1)]
        if beyond:
            raise ValueError(
                f"{engine} computes each key once, but all keys of {name!r} are rotated anew once a text is longer than "
                f"{beyond[0]} tokens, and it may be {config.max_position_embeddings}. Set `max_position_embeddings` of the "
                f"fused config.json to {beyond[0]}, or use `generate`."
            )


def prepared_for_engine(backbone: nn.Module) -> Carrier | None:
    """Numbers layers as engines look them up, among those of all specialists; transformers counts each one's.

    Returns:
        What hands on evidence from token to token, if the gate reads the past.
    """
    for start, specialist in zip(backbone.reader.first_layers, backbone.specialists.values(), strict=False):
        number_layers(specialist, start)
    if Reads.PAST not in backbone.fusion_gate.reads:
        return None
    carrier = Carrier(backbone.config, backbone.fusion_gate.evidence)
    find_head(backbone)
    return carrier


def check_pageable(config: UltraFuserConfig) -> None:
    """Refuses what continuous batching (`generate_batch`) cannot keep: its cache knows one attention geometry.

    Raises:
        ValueError: Naming each specialist's geometry.
    """
    _check_texts_end_to_end(config, "Continuous batching")
    if Reads.PAST in GATES[config.gate].reads:
        stateless = [name for name, gate in GATES.items() if Reads.PAST not in gate.reads]
        raise ValueError(
            f"Continuous batching keeps keys and values of each text and nothing else, but gate={config.gate!r} also carries "
            f"from token to token how well each specialist has predicted the text so far. Use `generate` for this model, "
            f"or another gate, one of {stateless}."
        )
    if attention_of_all(config) is None:
        raise ValueError(
            f"Continuous batching puts one paged attention in place of that of all layers, but specialists attend by "
            f"{of_each(config, attention_of)}. Let all attend alike first: "
            f"`model.set_attn_implementation('eager')`."
        )
    for reason, values in _differences(config, "num_key_value_heads", "head_dim"):
        raise ValueError(
            f"Continuous batching keeps keys and values of all layers in blocks of one shape, of full attention and of "
            f"one attention window at most. It {reason}, but it is {values}. Use `generate` for this model."
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
