"""Whether specialists fit together: what refuses when fusing is asked one by one, and nothing is loaded."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from logging.handlers import BufferingHandler

import psutil
import torch
from rich.filesize import decimal
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.adapters_ultrafuser import layout
from modeling_ultrafuser.architecture_ultrafuser import backbone_class, check_architecture, empty_model, parts_of
from modeling_ultrafuser.causal_ultrafuser import check_head_dtype
from modeling_ultrafuser.checkpoint_ultrafuser import check_gguf_weights, check_weights, empty_tensors
from modeling_ultrafuser.families_ultrafuser import spoken_rows
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE, gate_settings
from modeling_ultrafuser.generation_config_ultrafuser import merged_generation_config, own_generation_config
from modeling_ultrafuser.gguf_ultrafuser import is_gguf
from modeling_ultrafuser.inputs_ultrafuser import NO_ROUTER_LOSS
from modeling_ultrafuser.lora_ultrafuser import WEIGHTS_FILE, about_base, adaptable, common_base, pairs
from modeling_ultrafuser.plan_ultrafuser import as_dtype, check_names, check_saving, common_dtype
from modeling_ultrafuser.probing_ultrafuser import check_steps
from modeling_ultrafuser.reader_adapters_ultrafuser import THEIR_BASE
from modeling_ultrafuser.serving_ultrafuser import check_servable_by_vllm
from modeling_ultrafuser.specialist_config_ultrafuser import own_config
from modeling_ultrafuser.specialists_ultrafuser import BASE

from .. import licences
from ..merge import MERGES
from ..merge.merged_model import NotMergeableError, merge
from .estimates import estimate, part_sizes, size
from .findings import BLOCKS, FITS, WARNING, Judgement, each
from .metadata import Source, read
from .shared_tokenizer import judge_templates, judge_tokenizers


def judge(
    specialists: dict[str, tuple[str, str | None]],
    *,
    dtype: str = "auto",
    fusion: str = "logits",
    gate: str = DEFAULT_GATE,
    base: str | None = None,
) -> Judgement:
    """Says whether specialists can be fused, from what there is beside their weights.

    What only shows when a specialist speaks, such as an operation between its backbone and its head that no
    configuration tells of, is refused when fusing.

    Args:
        specialists: Name to folder or Hub id, and revision or None.
        dtype: Of the fused model; "auto" takes what all share.
        fusion: "logits" or "probabilities".
        gate: See `gate_settings`.
        base: Where the base of specialists that are adapters is, if it is not where they say.
    """
    found = Judgement()
    configs, models = {}, {}
    for name, (location, revision) in specialists.items():
        with found.refusals("access"):
            found.sources[name] = read(name, location, revision)
    whole = {n: s for n, s in found.sources.items() if s.adapter is None}
    about = nullcontext
    if len(whole) < len(found.sources) or base is not None:
        whole, about = _judge_base(found, specialists, base)
    for name, source in whole.items():
        with found.refusals("model"), about():
            config = _config(name, source)
            model = _judge_weights(found, name, source, config)
            _judge_parts(found, name, source, config)
            if model is not None:
                configs[name], models[name] = config, model
    parts = None
    if found.base is not None and models:
        parts = _judge_adapters(found, configs[BASE], models[BASE])
        configs, models = (dict.fromkeys(found.sources, part[BASE]) for part in (configs, models))
    texts = {n: copy.deepcopy(c.get_text_config(decoder=True)) for n, c in configs.items()}
    if not texts:
        return found
    # what a specialist does not say of itself its base does
    readable = {n: _speaking(found.sources[n], found.base) for n in texts}
    rows = min(spoken_rows(c) for c in texts.values())
    chosen = _judge_dtype(found, configs, dtype)
    judge_tokenizers(found, readable, texts, rows)
    with found.refusals("chat template"):
        judge_templates(found, readable)
    _judge_positions(found, texts)
    _judge_generation(found, {n: found.base or s for n, s in readable.items()}, configs, rows)
    _judge_licences(found, {n: found.sources[n] for n in texts} | ({THEIR_BASE: found.base} if found.base else {}))
    for c in texts.values():
        c.vocab_size = rows
    with found.refusals("dtype"):
        for n, c in texts.items():
            check_head_dtype(n, c, backbone_class(c), chosen)
    config = None
    with found.refusals("architecture"):
        adapters = None if parts is None else layout(parts)
        config = UltraFuserConfig(
            specialist_names=list(texts),
            specialists=list(texts.values()),
            fusion=fusion,
            **gate_settings(gate),
            adapters=adapters,
        )
        check_saving(config)
        check_steps(config)
        check_names(config)
        kinds = {n: f"{c.model_type} of {c.num_hidden_layers} x {c.hidden_size}" for n, c in texts.items()}
        found.note("architecture", FITS, f"{each(kinds)}.")
    if config is None or len(configs) < len(specialists):
        return found
    with found.refusals("vLLM", WARNING):
        check_servable_by_vllm(config)
        found.note("vLLM", FITS, "can serve the fused model.")
    _judge_merges(found, models)
    if found.verdict != BLOCKS:
        sizes = {n: size(m, texts[n], rows) for n, m in models.items()}
        sizes = part_sizes(config, models[next(iter(models))], sizes)
        dtype = chosen or torch.float32
        download = sum(s.download for s in (*found.sources.values(), found.base) if s is not None)
        found.numbers = estimate(config, sizes, dtype, download)
        _judge_memory(found)
    return found


def _judge_base(found: Judgement, specialists: dict[str, tuple[str, str | None]], base: str | None):
    """Reads the one base of all adapters, and returns it by its name, and what says whose it is; nothing if it is not."""
    with found.refusals("model"):
        sources = found.sources.items()
        adapters = common_base({n: specialists[n][0] for n, _ in sources}, {n: s.adapter for n, s in sources}, base)
        about = partial(about_base, adapters)
        with found.refusals("access"), about():
            found.base = read(BASE, adapters.base, adapters.revision)
            return {BASE: found.base}, about
    return {}, nullcontext


def _judge_adapters(found: Judgement, config: PreTrainedConfig, base: PreTrainedModel) -> dict[str, dict]:
    """Notes whether adapters fit their base, from the headers of their files. Returns what `pairs` does, by specialist."""
    linear, parts = adaptable(base, backbone_class(config.get_text_config(decoder=True))), {}
    for name, source in found.sources.items():
        if source.problem:
            _judge_problem(found, name, source)
            continue
        adapter, parts[name] = source.adapter, {}
        if adapter is not None:
            with found.refusals("weights"):
                parts[name] = pairs(name, adapter, empty_tensors(source.weights[WEIGHTS_FILE]), linear)
    ranks = {n: max((len(a) for a, _ in own.values()), default=0) for n, own in parts.items()}
    text = f"one base, {found.base.location}, for all: LoRA of rank {each(ranks)}."
    found.note("adapters", FITS, text)
    return parts


def _speaking(source: Source, base: Source | None) -> Source:
    return base if base is not None and "tokenizer_config.json" not in source.sizes else source


def _config(name: str, source: Source) -> PreTrainedConfig:
    config = own_config(name, source.location, revision=source.revision)
    check_architecture(name, config, config.get_text_config(decoder=True))
    return config


def _judge_weights(found: Judgement, name: str, source: Source, config: PreTrainedConfig) -> PreTrainedModel | None:
    """A specialist's model without any numbers, and whether its files hold just what it asks for; None if they do not."""
    if source.problem:
        _judge_problem(found, name, source)
    model = None
    with found.refusals("weights"):
        if is_gguf(source.location):
            model = check_gguf_weights(name, source.location, config)
        else:
            model = check_weights(name, config, source.header) if source.weights else empty_model(name, config)
    if model is not None:
        parts_of(name, model, config.get_text_config(decoder=True))
    return model


def _judge_problem(found: Judgement, name: str, source: Source) -> None:
    found.note(
        "weights",
        BLOCKS,
        f"{name}: {source.problem}. Only whole safetensors are read, because other formats can run code.",
        "Download it again, or load and save the model once to convert it.",
    )


def _judge_parts(found: Judgement, name: str, source: Source, config: PreTrainedConfig) -> None:
    if source.commit:
        gated = "; gated, and open to your token" if source.gated else ""
        found.note("access", FITS, f"{name}: {source.location} at commit {source.commit}{gated}.")
    text = config.get_text_config(decoder=True)
    if getattr(text, "output_router_logits", False):
        fix = "Nothing to do, unless you train: balance the experts before fusing."
        found.note("training", WARNING, f"{name}: {NO_ROUTER_LOSS}", fix)
    if text is not config:
        what = f"{name}: of {config.model_type!r} only the text part, {text.model_type!r}, is fused; it will not see."
        found.note("architecture", WARNING, what, "Nothing to do, unless you need images.")


def _judge_dtype(found: Judgement, configs: dict[str, PreTrainedConfig], dtype: str) -> torch.dtype | None:
    with found.refusals("dtype", fix="Choose one: --dtype bfloat16, say."):
        # where no configuration says it, the first specialist's files do
        first = found.sources[next(iter(configs))]
        chosen = as_dtype(dtype) if dtype != "auto" else common_dtype({}, configs) or _stored_dtype(first)
        found.note("dtype", FITS, f"{str(chosen or torch.float32).removeprefix('torch.')}.")
        return chosen
    return None


def _stored_dtype(source: Source) -> torch.dtype | None:
    counts = Counter()
    for dtype, shape in source.header.values():
        counts[dtype] += math.prod(shape)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return dtypes.get(max(counts, key=counts.get, default=None))


def _judge_positions(found: Judgement, texts: dict[str, PreTrainedConfig]) -> None:
    limits = {n: getattr(c, "max_position_embeddings", None) for n, c in texts.items()}
    shortest = min((limit for limit in limits.values() if limit), default=None)
    if len(set(limits.values())) > 1:
        text = f"the fused model's context is the shortest, {shortest} tokens: {each(limits)}."
        found.note("positions", WARNING, text, "Leave out the specialist with the short one if you need more.")
    else:
        found.note("positions", FITS, f"context of {shortest or 'no stated number of'} tokens.")
    ropes = {n: getattr(c, "rope_parameters", None) for n, c in texts.items()}
    if len({repr(r) for r in ropes.values()}) > 1:
        bases = {n: r.get("rope_theta", r) if r else None for n, r in ropes.items()}
        found.note("RoPE", FITS, f"each specialist keeps its own: {each(bases)}.")


def _judge_generation(found: Judgement, sources: dict[str, Source], configs: dict, rows: int) -> None:
    with found.refusals("generation"), _lines_of("modeling_ultrafuser.log_ultrafuser") as lines:
        own = {n: own_generation_config(s.location, configs[n], revision=s.revision) for n, s in sources.items()}
        merged = merged_generation_config(own, rows)
        ends = {n: c.eos_token_id if c else None for n, c in own.items()}
        if len({repr(e) for e in ends.values()}) > 1:
            text = f"the text ends at any specialist's end, {merged.eos_token_id}: {each(ends)}."
            found.note(
                "generation", WARNING, text, "Set `eos_token_id` in the fused generation_config.json for fewer."
            )
        else:
            found.note("generation", FITS, f"the text ends at id {merged.eos_token_id}.")
        for record in lines.buffer:
            fix = "Set it in the fused folder's generation_config.json."
            found.note("generation", WARNING, record.getMessage(), fix)


@contextmanager
def _lines_of(name: str) -> Iterator[BufferingHandler]:
    """Keeps what a module logs instead of showing it."""
    logger, handler = logging.getLogger(name), BufferingHandler(1 << 16)
    propagate, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


def _judge_licences(found: Judgement, sources: dict[str, Source]) -> None:
    ingredients = [licences.read_ingredient(n, str(s.folder)) for n, s in sources.items()]
    warnings = licences.warnings(ingredients)
    for text in warnings:
        found.note("licence", WARNING, text, "Read the terms before you pass the fused model on.")
    if not warnings:
        found.note("licence", FITS, f"{ingredients[0].stated}.")


def _judge_memory(found: Judgement) -> None:
    needed, free = found.numbers["disk"], psutil.virtual_memory().available
    if needed > free:
        text = f"the fused model takes {decimal(needed)} in memory, and {decimal(free)} are free here."
        halved = "Choose --dtype bfloat16, " if found.numbers["dtype"] == "float32" else "Choose "
        found.note("memory", WARNING, text, f"{halved}smaller specialists, or a machine with more.")


def _judge_merges(found: Judgement, models: dict[str, PreTrainedModel]) -> None:
    try:
        # on tensors without numbers, which costs nothing
        with torch.device("meta"):
            merge(models, "average")
    except NotMergeableError as error:
        found.no_merge = str(error)
    else:
        found.merges = list(MERGES)
