"""Whether specialists fit together: what refuses when fusing is asked one by one, and nothing is loaded."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.checking_ultrafuser import (
    as_dtype,
    auto_class,
    check_architecture,
    common_dtype,
    own_config,
)
from modeling_ultrafuser.serving_ultrafuser import check_servable_by_vllm
from modeling_ultrafuser.tokenizing_ultrafuser import merged_generation_config, own_generation_config

from .. import licences
from ..evaluation.merging import MERGES, NotMergeableError, merge
from .estimating import estimate, size
from .reading import Source, read
from .tokenizing import judge_templates, judge_tokenizers


FITS, WARNING, BLOCKS = "fits", "warning", "blocks"


@dataclass
class Finding:
    """One thing that was looked at.

    Attributes:
        about: What was looked at, in a word or two.
        status: "fits", "warning" or "blocks".
        text: What was found.
        fix: What to do about it, if anything can be.
    """

    about: str
    status: str
    text: str
    fix: str = ""


@dataclass
class Judgement:
    """Whether specialists fit together, and what fusing them would take.

    Attributes:
        sources: What was read of each, by name; those that could not be read are missing.
        findings: In the order in which they were made.
        merges: Names of the weight merges that would be possible, too.
        no_merge: Why none would be, if none.
        numbers: As `estimating.estimate` returns; None if blocked.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    no_merge: str | None = None
    numbers: dict | None = None

    @property
    def verdict(self) -> str:
        """The worst status of all."""
        return max((f.status for f in self.findings), key=[FITS, WARNING, BLOCKS].index, default=FITS)

    def note(self, about: str, status: str, text: str, fix: str = "") -> None:
        """Adds a finding."""
        self.findings.append(Finding(about, status, text, fix))

    @contextmanager
    def refusals(self, about: str, status: str = BLOCKS, fix: str | None = None) -> Iterator[None]:
        """Turns what refuses inside into a finding: its first sentence, and its way out as the fix."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            text, _, way_out = str(error).partition(". ")
            self.note(about, status, text.removesuffix(".") + ".", way_out if fix is None else fix)


def judge(
    specialists: dict[str, tuple[str, str | None]],
    *,
    dtype: str = "auto",
    gate: str = "mlp",
    fusion: str = "logits",
) -> Judgement:
    """Says whether specialists can be fused, from what there is beside their weights.

    What only shows when a specialist speaks, such as an operation between its backbone and its head that no
    configuration tells of, is refused when fusing.

    Args:
        specialists: Name to folder or Hub id, and revision or None.
        dtype: Of the fused model; "auto" takes what all share.
        gate: As for `UltraFuserForCausalLM.from_specialists`.
        fusion: As for `UltraFuserForCausalLM.from_specialists`.
    """
    found = Judgement()
    configs, models = {}, {}
    for name, (location, revision) in specialists.items():
        with found.refusals("access"):
            found.sources[name] = read(name, location, revision)
    for name, source in found.sources.items():
        with found.refusals("model"):
            configs[name], models[name] = _model(name, source)
            _judge_files(found, name, source, configs[name], models[name])
    texts = {n: copy.deepcopy(c.get_text_config(decoder=True)) for n, c in configs.items()}
    if not texts:
        return found
    readable = {n: found.sources[n] for n in texts}
    rows = min(c.vocab_size for c in texts.values())
    chosen = _judge_dtype(found, configs, dtype)
    judge_tokenizers(found, readable, texts, rows)
    judge_templates(found, readable)
    _judge_positions(found, texts)
    _judge_generation(found, readable, configs, rows)
    _judge_licences(found, readable)
    for c in texts.values():
        c.vocab_size = rows
    config = None
    with found.refusals("architecture"):
        config = UltraFuserConfig(
            specialist_names=list(texts), specialists=list(texts.values()), gate=gate, fusion=fusion
        )
        kinds = ", ".join(f"{n}: {c.model_type}, {c.num_hidden_layers} x {c.hidden_size}" for n, c in texts.items())
        found.note("architecture", FITS, f"{kinds}.")
    if config is None or len(configs) < len(specialists):
        return found
    with found.refusals("vLLM", WARNING):
        check_servable_by_vllm(config)
        found.note("vLLM", FITS, "can serve the fused model.")
    _judge_merges(found, models)
    if found.verdict != BLOCKS:
        sizes = {n: size(m, texts[n], rows) for n, m in models.items()}
        dtype = chosen or _stored_dtype(found.sources) or torch.float32
        found.numbers = estimate(config, sizes, dtype, sum(s.download for s in found.sources.values()))
    return found


def _model(name: str, source: Source) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """A specialist's configuration, and its model without any numbers."""
    config = own_config(name, source.location, revision=source.revision)
    check_architecture(name, config, config.get_text_config(decoder=True))
    kind = auto_class(name, config)
    with torch.device("meta"):
        model = kind.from_config(config)
    head = model.get_output_embeddings()
    width = config.get_text_config(decoder=True).hidden_size
    if not isinstance(head, nn.Linear) or head.bias is not None or head.in_features != width:
        raise ValueError(
            f"A specialist's head must be one matrix on its hidden state, without a bias, because the heads of all "
            f"become one, but that of {name!r} ({type(model).__name__}) is {head}. Use another architecture; a bias of "
            f"zeros can be set to None in a loaded model, which can then be fused."
        )
    return config, model


def _judge_files(found: Judgement, name: str, source: Source, config: PreTrainedConfig, model: PreTrainedModel):
    if source.commit:
        gated = "; gated, and open to your token" if source.gated else ""
        found.note("access", FITS, f"{name}: {source.location} at commit {source.commit}{gated}.")
    if source.problem:
        found.note(
            "weights",
            BLOCKS,
            f"{name}: {source.problem}. Only whole safetensors are read, because other formats can run code.",
            "Download it again, or load and save the model once to convert it.",
        )
    elif source.weights:
        _judge_rows(found, name, source, config.get_text_config(decoder=True), model)
    text = config.get_text_config(decoder=True)
    if text is not config:
        found.note(
            "architecture",
            WARNING,
            f"{name}: of {config.model_type!r} only the text part, {text.model_type!r}, is fused; it will not see.",
        )


def _judge_rows(found: Judgement, name: str, source: Source, text: PreTrainedConfig, model: PreTrainedModel) -> None:
    embedding = model.get_input_embeddings().weight
    key = next(k for k, p in model.named_parameters() if p is embedding)
    ending = ".".join(key.split(".")[-2:])
    tensors = {k: t for header in source.weights.files_metadata.values() for k, t in header.tensors.items()}
    saved = {t.shape[0] for k, t in tensors.items() if k.endswith(ending)}
    if saved and text.vocab_size not in saved:
        found.note(
            "weights",
            BLOCKS,
            f"{name}: its embedding has {min(saved)} rows, but its config.json says `vocab_size` {text.vocab_size}.",
            "Correct the number in its config.json.",
        )


def _judge_dtype(found: Judgement, configs: dict[str, PreTrainedConfig], dtype: str) -> torch.dtype | None:
    with found.refusals("dtype"):
        if dtype != "auto":
            return as_dtype(dtype)
    with found.refusals("dtype", fix="Choose one: --dtype bfloat16, say."):
        common = common_dtype({}, configs)
        written = {str(common).removeprefix("torch.")} if common else sorted(_stored(found.sources))
        found.note("dtype", FITS, f"{', '.join(written) or 'none is written down'}.")
        return common
    return None


def _stored(sources: dict[str, Source]) -> set[str]:
    return {
        d for s in sources.values() if s.weights for h in s.weights.files_metadata.values() for d in h.parameter_count
    }


def _stored_dtype(sources: dict[str, Source]) -> torch.dtype | None:
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(next(iter(_stored(sources)), None))


def _judge_positions(found: Judgement, texts: dict[str, PreTrainedConfig]) -> None:
    limits = {n: getattr(c, "max_position_embeddings", None) for n, c in texts.items()}
    shortest = min((limit for limit in limits.values() if limit), default=None)
    if len(set(limits.values())) > 1:
        text = f"the fused model's context is the shortest, {shortest} tokens: {limits}."
        found.note("positions", WARNING, text, "Leave out the specialist with the short one if you need more.")
    else:
        found.note("positions", FITS, f"context of {shortest or 'no stated number of'} tokens.")
    ropes = {n: getattr(c, "rope_parameters", None) for n, c in texts.items()}
    if len({repr(r) for r in ropes.values()}) > 1:
        bases = {n: r.get("rope_theta", r) if r else None for n, r in ropes.items()}
        found.note("RoPE", FITS, f"each specialist keeps its own: {bases}.")


def _judge_generation(found: Judgement, sources: dict[str, Source], configs: dict, rows: int) -> None:
    with found.refusals("generation"), _lines_of("modeling_ultrafuser.tokenizing_ultrafuser") as lines:
        own = {n: own_generation_config(s.location, configs[n], revision=s.revision) for n, s in sources.items()}
        merged = merged_generation_config(own, rows)
        ends = {n: c.eos_token_id if c else None for n, c in own.items()}
        status = WARNING if len({repr(e) for e in ends.values()}) > 1 else FITS
        text = f"the text ends at id {merged.eos_token_id}" + (
            f", the ends of all: {ends}." if status != FITS else "."
        )
        found.note("generation", status, text)
        for record in lines.buffer:
            found.note(
                "generation", WARNING, record.getMessage(), "Set it in the fused folder's generation_config.json."
            )


@contextmanager
def _lines_of(name: str) -> Iterator[BufferingHandler]:
    """Keeps what a module logs instead of showing it."""
    logger, handler = logging.getLogger(name), BufferingHandler(1 << 16)
    kept = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.propagate, logger.level = kept[0], kept[1]


def _judge_licences(found: Judgement, sources: dict[str, Source]) -> None:
    ingredients = [licences.read_ingredient(n, str(s.folder)) for n, s in sources.items()]
    warnings = licences.warnings(ingredients)
    for text in warnings:
        found.note("licence", WARNING, text)
    if not warnings:
        found.note("licence", FITS, f"{ingredients[0].stated}.")


def _judge_merges(found: Judgement, models: dict[str, PreTrainedModel]) -> None:
    try:
        # on tensors without numbers, which costs nothing
        with torch.device("meta"):
            merge(models, "average")
    except NotMergeableError as error:
        found.no_merge = str(error)
    else:
        found.merges = list(MERGES)
