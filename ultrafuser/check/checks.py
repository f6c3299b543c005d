"""Runs the checks of fusing without loading a weight, and adds advice that fusing itself does not need."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import psutil
import torch
from rich.filesize import decimal
from transformers import PreTrainedModel

from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE, gate_settings
from modeling_ultrafuser.plan_base_ultrafuser import BLOCKS, FITS, WARNING, Finding, FusionPlan
from modeling_ultrafuser.plan_ultrafuser import each, refused, run_checks
from modeling_ultrafuser.reader_adapters_ultrafuser import THEIR_BASE
from modeling_ultrafuser.reader_base_ultrafuser import BASE
from modeling_ultrafuser.serving_ultrafuser import check_servable

from .. import licences
from ..merge import fitting_merges
from ..merge.merge_base import NotMergeableError
from ..merge.merged_model import merge
from .estimates import estimate, part_sizes, size
from .metadata import Source
from .plan_files import MetadataFiles, compare_templates


@dataclass
class Judgement:
    """Verdict on whether specialists fit together, and what fusing them would take.

    Attributes:
        sources: What was read of each, by name; those that could not be read are missing.
        base: What was read of the base, where specialists are adapters of one.
        findings: In the order in which they were made.
        merges: Names of the weight merges that would be possible, too.
        no_merge: Why none would be, if none.
        numbers: As `estimates.estimate` returns; None if blocked.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    base: Source | None = None
    findings: list[Finding] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    no_merge: str | None = None
    numbers: dict | None = None

    @property
    def verdict(self) -> str:
        """The worst status of all."""
        return max((f.status for f in self.findings), key=[FITS, WARNING, BLOCKS].index, default=FITS)


def judge(
    specialists: dict[str, tuple[str, str | None]],
    *,
    dtype: str = "auto",
    gate: str = DEFAULT_GATE,
    base: str | None = None,
    **choices,
) -> Judgement:
    """Runs the checks of fusing without weights, adds advice, and estimates what fusing would take.

    What only shows when a specialist runs, such as an operation between its backbone and its head that no
    configuration tells of, is rejected when fusing.

    Args:
        specialists: Name to folder or Hub id, and revision or None.
        dtype: Of the fused model; "auto" takes what all share.
        gate: See `gate_settings`.
        base: Where the base of specialists that are adapters is, if it is not where they say.
        choices: Other fields of the configuration: `fusion`, `gate_sparsifier`, `signed_weights`.
    """
    files = MetadataFiles()
    places = {name: location for name, (location, _) in specialists.items()}
    revisions = {name: {"revision": revision} for name, (_, revision) in specialists.items()}
    plan = FusionPlan(places, revisions, {**gate_settings(gate), **choices}, dtype=dtype, base=base, files=files)
    judgement = Judgement(findings=list(run_checks(plan, collect=True)))
    judgement.sources = {name: files.sources[name] for name in specialists if name in files.sources}
    if plan.adapters is not None and BASE in plan.whole:
        judgement.base = files.source_at(plan.whole[BASE], plan.places[BASE])
    if plan.texts:
        for advise in ADVICE:
            judgement.findings.extend(advise(plan, judgement))
    if plan.config is not None and len(plan.specialists) == len(specialists):
        _measure(plan, judgement)
    return judgement


def _access(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    for name, source in judgement.sources.items():
        if source.commit and name in plan.specialists:
            gated = "; gated, and open to your token" if source.gated else ""
            yield Finding("access", FITS, f"{name}: {source.location} at commit {source.commit}{gated}.")


def _adapters(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    if plan.adapters is not None:
        ranks = {n: max((len(a) for a, _ in part.values()), default=0) for n, part in plan.parts.items()}
        yield Finding("adapters", FITS, f"one base, {judgement.base.location}, for all: LoRA of rank {each(ranks)}.")


def _architecture(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    blocked = any((f.about, f.status) == ("architecture", BLOCKS) for f in judgement.findings)
    if plan.config is not None and not blocked:
        configs = zip(plan.config.specialist_names, plan.config.specialists, strict=True)
        kinds = {n: f"{c.model_type} of {c.num_hidden_layers} x {c.hidden_size}" for n, c in configs}
        yield Finding("architecture", FITS, f"{each(kinds)}.")


def _dtype(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    if plan.dtype != "auto":
        yield Finding("dtype", FITS, f"{str(plan.number_type or torch.float32).removeprefix('torch.')}.")


def _templates(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    try:
        yield from compare_templates({n: plan.files.with_tokenizer(plan, n) for n in plan.specialists})
    except (ValueError, OSError) as error:
        yield replace(refused(error), about="chat template")


def _positions(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    limits = {n: getattr(c, "max_position_embeddings", None) for n, c in plan.texts.items()}
    shortest = min((limit for limit in limits.values() if limit), default=None)
    if len(set(limits.values())) > 1:
        text = f"the fused model's context is the shortest, {shortest} tokens: {each(limits)}."
        yield Finding("positions", WARNING, text, "Leave out the specialist with the short one if you need more.")
    else:
        yield Finding("positions", FITS, f"context of {shortest or 'no stated number of'} tokens.")
    ropes = {n: getattr(c, "rope_parameters", None) for n, c in plan.texts.items()}
    if len({repr(r) for r in ropes.values()}) > 1:
        bases = {n: r.get("rope_theta", r) if r else None for n, r in ropes.items()}
        yield Finding("RoPE", FITS, f"each specialist keeps its own: {each(bases)}.")


def _licences(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    sources = {n: judgement.sources[n] for n in plan.specialists}
    if judgement.base is not None:
        sources[THEIR_BASE] = judgement.base
    ingredients = [licences.read_ingredient(n, str(s.folder)) for n, s in sources.items()]
    warnings = licences.warnings(ingredients)
    for text in warnings:
        yield Finding("licence", WARNING, text, "Read the terms before you pass the fused model on.")
    if not warnings:
        yield Finding("licence", FITS, f"{ingredients[0].stated}.")


def _vllm(plan: FusionPlan, judgement: Judgement) -> Iterator[Finding]:
    if plan.config is None or len(plan.specialists) < len(plan.names):
        return
    try:
        check_servable(plan.config)
    except ValueError as error:
        yield Finding("vLLM", WARNING, str(error), "Or serve it with transformers: `ultrafuser serve`.")
    else:
        yield Finding("vLLM", FITS, "can serve the fused model, but in no pipeline stages and with no EAGLE-3 head.")


# what is worth knowing before fusing, though fusing goes on without it
ADVICE = [_access, _adapters, _architecture, _dtype, _templates, _positions, _licences, _vllm]


def _measure(plan: FusionPlan, judgement: Judgement) -> None:
    """Fills in which merges are possible, and what the fused model takes."""
    models, texts = plan.models, plan.texts
    if plan.adapters is not None:
        models, texts = (dict.fromkeys(plan.specialists, part[BASE]) for part in (models, texts))
    _note_merges(judgement, models)
    if judgement.verdict == BLOCKS:
        return
    sizes = {n: size(m, texts[n], plan.vocab_size) for n, m in models.items()}
    sizes = part_sizes(plan.config, models[next(iter(models))], sizes)
    download = sum(s.download for s in (*judgement.sources.values(), judgement.base) if s is not None)
    judgement.numbers = estimate(plan.config, sizes, plan.number_type or torch.float32, download)
    needed, free = judgement.numbers["disk"], psutil.virtual_memory().available
    if needed > free:
        text = f"the fused model takes {decimal(needed)} in memory, and {decimal(free)} are free here."
        halved = "Choose --dtype bfloat16, " if judgement.numbers["dtype"] == "float32" else "Choose "
        fix = f"{halved}smaller specialists, or a machine with more."
        judgement.findings.append(Finding("memory", WARNING, text, fix))


def _note_merges(judgement: Judgement, models: dict[str, PreTrainedModel]) -> None:
    try:
        # on tensors without numbers, which costs nothing
        with torch.device("meta"):
            merge(models, "average")
    except NotMergeableError as error:
        judgement.no_merge = str(error)
    else:
        layers = next(iter(models.values())).config.get_text_config(decoder=True).num_hidden_layers
        judgement.merges = fitting_merges(list(models), layers)
