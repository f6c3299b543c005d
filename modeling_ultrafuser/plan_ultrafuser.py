"""The plan of a fusion, and the checks that it must pass before anything large is loaded, in one ordered list.

`from_specialists` raises the first refusal; `ultrafuser check` runs the same list and collects all of them. A new check
is a function and a line in `CHECKS`.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .adapters_ultrafuser import layout
from .architecture_ultrafuser import (
    auto_class,
    backbone_class,
    check_architecture,
    empty_backbones,
    empty_model,
    parts_of,
)
from .causal_ultrafuser import check_head_dtype
from .checkpoint_ultrafuser import check_gguf_weights, check_weights, empty_tensors
from .configuration_ultrafuser import UltraFuserConfig
from .families_ultrafuser import spoken_rows
from .generation_config_ultrafuser import merged_generation_config, own_generation_config
from .gguf_ultrafuser import is_gguf
from .inputs_ultrafuser import NO_ROUTER_LOSS
from .lora_ultrafuser import Layers, about_base, adaptable, pairs, read_adapters
from .names_ultrafuser import refuse_ambiguous_names
from .plan_base_ultrafuser import BLOCKS, FITS, WARNING, Finding, FusionPlan
from .probing_ultrafuser import check_steps
from .reader_base_ultrafuser import BASE
from .refusals_ultrafuser import Refusal
from .specialist_config_ultrafuser import own_config
from .tokenizer_ultrafuser import load_tokenizer, tokenizer_notes, widest_usable_tokenizer


PLACEHOLDER = AutoConfig.for_model("llama")


def check_choices(plan: FusionPlan) -> None:
    """Rejects names, their number and choices, before anything is read."""
    if not plan.names:
        raise Refusal(
            "there are no specialists",
            "Fusing needs at least two specialists",
            "Pass {'text': ..., 'code': ...}.",
            about="specialists",
        )
    UltraFuserConfig(specialist_names=plan.names, specialists=[PLACEHOLDER] * len(plan.names), **plan.choices)


def locate(plan: FusionPlan, name: str) -> None:
    """Finds a specialist."""
    place = plan.files.locate(name, plan.specialists[name], plan.hub[name])
    plan.specialists[name], plan.hub[name] = plan.whole[name], plan.places[name] = place


def find_base(plan: FusionPlan) -> None:
    """Finds the one base of specialists that are adapters: it is loaded in their place."""
    # nothing is left to check if they are of different bases
    (whole, plan.whole), (places, plan.places) = (plan.whole, {}), (plan.places, {})
    plan.adapters = read_adapters(plan.specialists, plan.hub, plan.base)
    if plan.adapters is None:
        plan.whole, plan.places = whole, places
    else:
        with about_base(plan.adapters):
            hub = {**plan.hub_options, "revision": plan.adapters.revision}
            plan.whole[BASE], plan.places[BASE] = plan.files.locate(BASE, plan.adapters.base, hub)


def read_config(plan: FusionPlan, name: str) -> None:
    """Reads a specialist's configuration."""
    plan.configs[name] = own_config(name, plan.whole[name], **plan.places[name])


def check_decoder(plan: FusionPlan, name: str) -> Iterator[Finding]:
    """Rejects what is no causal decoder with a key-value cache."""
    config = plan.configs[name]
    text = copy.deepcopy(config.get_text_config(decoder=True))
    check_architecture(name, config, text)
    if not isinstance(plan.whole[name], PreTrainedModel):
        auto_class(name, config)
    plan.texts[name] = text
    if getattr(text, "output_router_logits", False):
        line = f"{name}: {NO_ROUTER_LOSS}"
        fix = "Nothing to do, unless you train: balance the experts before fusing."
        yield Finding("training", WARNING, line, fix, (line,))
    if config.get_text_config(decoder=True) is not config:
        seen = f"{name}: of {config.model_type!r} only the text part, {text.model_type!r}, is fused; it will not see."
        yield Finding("architecture", WARNING, seen, "Nothing to do, unless you need images.")


def choose_dtype(plan: FusionPlan) -> None:
    """Rejects specialists that share no dtype, if none is chosen."""
    plan.dtype = common_dtype(plan.whole, plan.configs) if plan.dtype == "auto" else as_dtype(plan.dtype)


def cut_vocabulary(plan: FusionPlan) -> None:
    """Cuts every vocabulary to the smallest."""
    plan.vocab_size = min(spoken_rows(c) for c in plan.texts.values())
    plan.rows = {name: c.vocab_size for name, c in plan.texts.items()}
    for config in plan.texts.values():
        config.vocab_size = plan.vocab_size
        if (getattr(config, "pad_token_id", None) or 0) >= plan.vocab_size:
            config.pad_token_id = None


def check_adapter_layers(plan: FusionPlan, name: str) -> None:
    """Rejects an adapter that does not fit the layers of its base."""
    if plan.adapters is None:
        return
    adapter = plan.adapters.configs[name]
    plan.parts[name] = {}
    if adapter is not None:
        header = plan.files.adapter_header(name, plan.specialists[name], plan.hub[name])
        plan.parts[name] = pairs(name, adapter, empty_tensors(header), adaptable_layers(plan))


def adaptable_layers(plan: FusionPlan) -> Layers:
    """Layers of the base that adapters can be on, from its configuration."""
    return adaptable(empty_model(BASE, plan.configs[BASE]), backbone_class(plan.texts[BASE]))


def configure(plan: FusionPlan) -> None:
    """Rejects specialists and choices that do not fit together in one configuration."""
    names, configs, choices = list(plan.texts), list(plan.texts.values()), dict(plan.choices)
    if plan.adapters is not None:
        names, configs = list(plan.specialists), configs * len(plan.specialists)
        choices["adapters"] = layout(plan.parts)
    # fewer than two are left where others were refused
    if len(names) > 1:
        plan.config = UltraFuserConfig(specialist_names=names, specialists=configs, **choices)


def weigh_signs(plan: FusionPlan) -> Iterator[Finding]:
    """Tells what signed weights sum to if that is not 1."""
    total = sum(plan.config.signed_weights or [1.0])
    if abs(total - 1) > 1e-6:
        line = (
            f"`signed_weights` sum to {total:g}: the fused model is as sure as if its logits were multiplied by that."
        )
        yield Finding("gate", WARNING, line, "Nothing to do, or give numbers that sum to 1.", (line,))


def check_saving(plan: FusionPlan) -> None:
    """Refuses specialists whose configuration does not survive being saved as a part of the fused model's.

    Raises:
        ValueError: Naming the first such specialist, or the whole, and what happened.
    """
    config = plan.config
    parts = dict(zip(config.specialist_names, config.specialists, strict=True)) | {"the fused model": config}
    for name, part in parts.items():
        cause = fact = None
        try:
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
                read = type(part).from_pretrained(folder)
            written, back = _plain(part), _plain(read)
            if lost := [key for key, value in written.items() if back.get(key) != value]:
                fact = f"{lost} of {name!r} ({part.model_type!r}) are read back as something else"
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            cause, fact = error, f"the configuration of {name!r} ({part.model_type!r}) cannot be saved: {reason}"
        if fact:
            raise Refusal(
                fact,
                "A fused model is saved with the configuration of every specialist",
                "Correct its config.json, or fuse a model of another family.",
                about="architecture",
            ) from cause


def check_cache_steps(plan: FusionPlan) -> None:
    """Rejects specialists that cannot take a step with the cache that all share, as far as that shows without weights."""
    check_steps(plan.config)


def check_names(plan: FusionPlan) -> None:
    """Refuses names of specialists that are words in the paths of their modules, or fields of their configurations."""
    config = plan.config
    parts = {part for b in empty_backbones(config) for path, _ in b.named_parameters() for part in path.split(".")}
    refuse_ambiguous_names(config.specialist_names, config.backbones, parts)


def compare_tokenizers(plan: FusionPlan) -> Iterator[Finding]:
    """Rejects tokenizers that give one id to different tokens, or split text differently."""
    names, equal = plan.files.tokenizers_to_compare(plan)
    for name in names:
        tokenizer = load_tokenizer(plan.specialists[name], plan.base, **plan.hub[name])
        if tokenizer is None:
            line = f"{name}: its folder holds no tokenizer, so nothing checks that its token ids mean the same."
            yield Finding("tokenizer", WARNING, line, "Save it beside the model: `ultrafuser fuse` needs it.", (line,))
        else:
            plan.tokenizers[name] = tokenizer
    notes = []
    # one alone has none to agree with; whether it fits the rows matters only if no other does
    if len(plan.tokenizers) + equal > 1 and plan.tokenizers:
        chosen = widest_usable_tokenizer(plan.tokenizers, plan.vocab_size)
        notes = tokenizer_notes(plan.tokenizers, plan.vocab_size, chosen)
        for fact, way_out in notes:
            yield Finding("tokenizer", WARNING, fact, way_out, (f"{fact} {way_out}",))
    if not notes and (plan.tokenizers or equal):
        some = ", some of it" if names else ","
        yield Finding(
            "tokenizer",
            FITS,
            f"the same for all{f'{some} told from the hashes of the files on the Hub' if equal else ''}.",
        )


def compare_vocabularies(plan: FusionPlan) -> Iterator[Finding]:
    """Tells which rows of which vocabulary are cut, and which tokens are lost with them."""
    rows = plan.vocab_size
    if set(plan.rows.values()) == {rows}:
        yield Finding("vocabulary", FITS, f"{rows} rows in each.")
        return
    lines = tuple(
        f"{name}: {own} vocabulary rows cut to {rows}, the smallest vocabulary among the specialists; the {own - rows} "
        f"rows beyond it are dropped."
        for name, own in plan.rows.items()
        if own > rows
    )
    beyond = {n: sorted(i for i in t.get_vocab().values() if i >= rows) for n, t in plan.tokenizers.items()}
    lost = {n: plan.tokenizers[n].convert_ids_to_tokens(ids[:3]) for n, ids in beyond.items() if ids}
    cut = f"cut to {rows} rows, the smallest of {each(plan.rows)};"
    if lost:
        fix = "Prompts with those tokens are for the specialist alone."
        yield Finding("vocabulary", WARNING, f"{cut} tokens beyond them are lost, such as {each(lost)}.", fix, lines)
    else:
        yield Finding("vocabulary", FITS, f"{cut} no token uses the others.", lines=lines)


def merge_generation(plan: FusionPlan) -> Iterator[Finding]:
    """Rejects ends of text that the fused vocabulary lacks; merges the settings of generation."""
    written = {n: own_generation_config(s, plan.configs[n], **plan.places[n]) for n, s in plan.whole.items()}
    plan.generation_config, notes = merged_generation_config(written, plan.vocab_size)
    ends, end = {n: c.eos_token_id if c else None for n, c in written.items()}, plan.generation_config.eos_token_id
    if len({repr(e) for e in ends.values()}) > 1:
        fix = "Set `eos_token_id` in the fused generation_config.json for fewer."
        yield Finding("generation", WARNING, f"the text ends at any specialist's end, {end}: {each(ends)}.", fix)
    else:
        yield Finding("generation", FITS, f"the text ends at id {end}.")
    for note in notes:
        fix = "Set it in the fused folder's generation_config.json."
        yield Finding("generation", WARNING, note, fix, (note,))


def check_tensors(plan: FusionPlan, name: str) -> None:
    """Rejects files that do not hold exactly the tensors that their configuration asks for."""
    source, config = plan.whole[name], plan.configs[name]
    if isinstance(source, PreTrainedModel):
        plan.models[name] = source
    elif is_gguf(source):
        plan.models[name] = check_gguf_weights(name, os.fspath(source), config)
    else:
        plan.headers[name] = plan.files.header(name, source, plan.places[name])
        plan.models[name] = check_weights(name, config, plan.headers[name])


def check_head(plan: FusionPlan, name: str) -> None:
    """Rejects a specialist that is no backbone followed by one linear head."""
    parts_of(name, plan.models[name], plan.texts[name])


def check_head_dtypes(plan: FusionPlan, name: str) -> None:
    """Rejects to round a head that its family keeps in float32."""
    config = plan.texts[name]
    check_head_dtype(name, config, backbone_class(config), plan.number_type)


@dataclass
class Check:
    """A check of a plan.

    Attributes:
        run: From the plan, and one name where `each` is set, to findings or nothing. Raises what it rejects.
        each: The field of the plan that it is run for each name of.
        needs: The field of the plan without which it is left out.
    """

    run: Callable[..., Iterable[Finding] | None]
    each: str | None = None
    needs: str | None = None


CHECKS = [
    Check(check_choices),
    Check(locate, each="specialists"),
    Check(find_base, needs="specialists"),
    Check(read_config, each="whole"),
    Check(check_decoder, each="whole"),
    Check(choose_dtype, needs="texts"),
    Check(cut_vocabulary, needs="texts"),
    Check(check_adapter_layers, each="specialists", needs="texts"),
    Check(configure, needs="texts"),
    Check(weigh_signs, needs="config"),
    Check(check_saving, needs="config"),
    Check(check_cache_steps, needs="config"),
    Check(check_names, needs="config"),
    Check(compare_tokenizers, needs="texts"),
    Check(compare_vocabularies, needs="texts"),
    Check(merge_generation, needs="texts"),
    Check(check_tensors, each="whole"),
    Check(check_head, each="whole"),
    Check(check_head_dtypes, each="whole"),
]


def run_checks(plan: FusionPlan, *, collect: bool = False) -> Iterator[Finding]:
    """Runs `CHECKS` in their order, and yields what they find.

    Args:
        plan: What is to be fused; the checks fill it in.
        collect: Yields what is rejected as findings, too, and leaves it out of the checks that follow. Otherwise the
            first refusal is raised.

    Raises:
        ValueError, OSError, ImportError: If a specialist is rejected or cannot be read, unless `collect`.
    """
    found = []
    for check in CHECKS:
        for name in list(getattr(plan, check.each)) if check.each else [None]:
            if check.needs and not getattr(plan, check.needs):
                continue
            try:
                is_base = name == BASE and plan.adapters is not None
                with about_base(plan.adapters) if is_base else nullcontext():
                    yield from check.run(plan, *([name] if check.each else [])) or ()
            except (ValueError, OSError, ImportError) as error:
                if not collect:
                    raise
                # what all fields together break shows with placeholders, and again with the specialists
                if refused(error) not in found:
                    found.append(refused(error))
                    yield found[-1]
                plan.leave_out(name)


def refused(error: Exception) -> Finding:
    """Returns an error as a finding."""
    if isinstance(error, Refusal):
        return Finding(error.about, BLOCKS, error.problem, error.way_out)
    return Finding("model", BLOCKS, str(error), "Correct what is named, or leave the specialist out.")


def each(values: dict) -> str:
    """Returns a value for each name, in words."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def unequal_dtypes(dtypes: dict) -> Refusal:
    """The refusal of specialists that do not share one dtype."""
    return Refusal(
        f"the specialists' dtypes differ: {dtypes}",
        "All specialists of a fused model have one dtype, because one head multiplies all their hidden states",
        "Choose one: dtype=torch.bfloat16, say, or `--dtype bfloat16`.",
        about="dtype",
    )


def common_dtype(specialists: dict, configs: dict[str, PreTrainedConfig]) -> torch.dtype | None:
    """The dtype that all specialists share, None if none writes one down, or a refusal."""
    dtypes = {n: as_dtype(c.dtype or c.get_text_config(decoder=True).dtype) for n, c in configs.items()}
    # a model in memory may have been cast since its configuration was written
    dtypes |= {n: s.dtype for n, s in specialists.items() if isinstance(s, PreTrainedModel)}
    if len(set(dtypes.values()) - {None}) > 1:
        raise unequal_dtypes(dtypes)
    return next((d for d in dtypes.values() if d is not None), None)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise Refusal(
            f"`dtype` is {dtype!r}",
            "It must be 'auto' or a floating point type",
            "Choose one: torch.bfloat16, say.",
            about="dtype",
        )
    return found


def _plain(config: PreTrainedConfig) -> dict:
    """Returns a configuration as its file has it."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k not in _OF_THE_FILE}


# what saving itself writes
_OF_THE_FILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "auto_map")
