"""From specialists to a fused model: the plan is checked, then each specialist is loaded, cut, scaled and probed."""

import copy
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .adapters_ultrafuser import HEAD, adapted_head, adapted_state
from .architecture_ultrafuser import auto_class
from .checkpoint_ultrafuser import refuse_other_tensors
from .files_ultrafuser import in_words
from .gates_ultrafuser import DEFAULT_GATE, GATES, gate_settings
from .gguf_ultrafuser import dequantised, gguf_arguments, is_gguf
from .log_ultrafuser import no_bars, print_line
from .lora_ultrafuser import read_parts
from .plan_ultrafuser import FusionPlan, adaptable_layers, run_checks, unequal_dtypes
from .probing_ultrafuser import probe_specialist, tolerance
from .reader_base_ultrafuser import BASE
from .refusals_ultrafuser import Refusal
from .signed_ultrafuser import in_order
from .sparsifiers_ultrafuser import NONE


def fuse_specialists(
    cls: type[PreTrainedModel],
    specialists: dict[str, str | os.PathLike | PreTrainedModel],
    *,
    gate: str = DEFAULT_GATE,
    fusion: str = "logits",
    dtype: str | torch.dtype = "auto",
    gate_hidden_size: int | None = None,
    gate_temperature: float = 1.0,
    gate_sparsifier: str = NONE,
    signed_weights: Mapping[str, float] | Sequence[float] | None = None,
    gate_calibration: bool | None = None,
    gate_switch_probability: float | None = None,
    revisions: dict[str, str] | None = None,
    device_map=None,
    attn_implementation: str | None = None,
    base: str | os.PathLike | None = None,
    **hub_kwargs,
) -> PreTrainedModel:
    """Builds a fused model out of specialists. Reached as `UltraFuserForCausalLM.from_specialists`.

    Everything that can be told from configurations and tokenizers is checked before any weight is loaded. Then one
    specialist at a time is loaded, run once on a short input, and refused if its backbone and head, rebuilt as parts
    of the fused model, do not give its own logits.

    Args:
        specialists: Name to Hub id, local folder or model in memory, in the order of the gate's columns. Models in
            memory are copied. For multimodal checkpoints the text part is taken. LoRA adapters of one base, as PEFT
            saves them, are fused on that base, which is loaded once; one of the specialists may be the base itself.
        gate: A name in `GATES`, or a word that says more, see `gate_settings`: "mlp" is the paper's. A new gate gives every
            specialist the same weight.
        fusion: A name in `FUSIONS`.
        dtype: Of the specialists and the head. "auto" takes what all specialists share; required if they differ.
        gate_hidden_size: Width of the hidden layer of a gate that has one. Default: what `gate` says, or else 512.
        gate_temperature: Divides the gate's scores before the softmax.
        gate_sparsifier: Which specialists keep a weight at a token, see `UltraFuserConfig`.
        signed_weights: A number of either sign for each specialist, by name or in their order, which the gate's scores are
            added to: {"large": 1, "tuned": 1, "base": -1} with gate="uniform" is proxy-tuning.
        gate_calibration: Whether the gate also predicts temperatures, token by token. Default: what `gate` says.
        gate_switch_probability: Of the "posterior" gate, see `UltraFuserConfig`.
        revisions: Name to branch, tag or commit of its Hub repository. Pin commits for results to be repeatable.
        device_map: Where the fused model goes, as for `from_pretrained`.
        attn_implementation: As for `from_pretrained`; reaches every specialist.
        base: Where the base of specialists that are adapters is, if it is not where they say: its plain weights instead
            of quantised ones, or its new place.
        **hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for `from_pretrained`.

    Returns:
        The fused model in evaluation mode, with a generation configuration merged from the specialists'.

    Raises:
        ValueError: If the specialists cannot be fused, with the rule, what came, and the way out.
        OSError: If a specialist cannot be found or read.
    """
    unknown = set(hub_kwargs) - {"token", "cache_dir", "local_files_only"}
    if unknown:
        raise TypeError(f"from_specialists() got unknown arguments {sorted(unknown)}.")
    if not isinstance(specialists, dict):
        raise TypeError(f"`specialists` must map a name to each specialist, but got {type(specialists).__name__}.")
    given = {"gate_hidden_size": gate_hidden_size, "gate_calibration": gate_calibration}
    choices = {
        **gate_settings(gate),
        **{field: value for field, value in given.items() if value is not None},
        "gate_temperature": gate_temperature,
        "gate_sparsifier": gate_sparsifier,
        "signed_weights": in_order(signed_weights, list(specialists)),
        "gate_switch_probability": gate_switch_probability,
        "fusion": fusion,
    }
    hub = _hub_options(list(specialists), revisions or {}, hub_kwargs)
    plan = FusionPlan(dict(specialists), hub, choices, dtype=dtype, base=base, hub_options=hub_kwargs)
    for finding in run_checks(plan):
        for line in finding.lines:
            print_line(line)
    state = load_specialists(cls, plan)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return assemble(cls, plan, state, device_map=device_map, **extra)


def _hub_options(names: list[str], revisions: dict[str, str], hub_kwargs: dict) -> dict[str, dict]:
    """Returns options of `from_pretrained` for each specialist."""
    if unknown := sorted(set(revisions) - set(names)):
        raise Refusal(
            f"`revisions` names {unknown}",
            f"Specialists are {names}",
            "Name one of those, or leave the revision out.",
            about="specialists",
        )
    return {name: {**hub_kwargs, "revision": revisions.get(name) or "main"} for name in names}


def load_specialists(cls: type[PreTrainedModel], plan: FusionPlan) -> dict[str, Tensor]:
    """Loads and probes what a checked plan holds, one model after another.

    Args:
        cls: Of the fused model.
        plan: All of whose checks have passed. Its dtype is filled in if no configuration says it.

    Returns:
        The fused model's tensors by name: backbones, the wide head, a new gate.

    Raises:
        ValueError: If a specialist is not what it seemed.
    """
    config, state, head, column = plan.config, {}, None, 0
    parts = None
    if plan.adapters is not None:
        parts = read_parts(plan.adapters, plan.specialists, plan.hub, adaptable_layers(plan))
    for k, (name, source) in enumerate(plan.whole.items()):
        model = load_specialist(name, source, plan.configs[name], plan.dtype, **plan.places[name])
        if plan.dtype is None:
            plan.dtype = model.dtype
        elif model.dtype != plan.dtype:
            raise unequal_dtypes({name: model.dtype, "the others": plan.dtype})
        backbone_state, columns, scale = probe_specialist(name, model, config, k, plan.texts[name])
        if head is None:
            head = torch.empty(config.vocab_size, config.hidden_size, dtype=plan.dtype)
        head[:, column : column + columns.shape[1]] = columns
        column += columns.shape[1]
        if parts is not None:
            with torch.device("meta"):
                adapted = cls(config).model.specialists[BASE]
            backbone_state = adapted_state(adapted, backbone_state, parts)
            if hasattr(adapted, HEAD):
                backbone_state[f"{HEAD}.lora_A"] = adapted_head(head, getattr(adapted, HEAD), parts, scale)
        # a model in memory stays its owner's: training the fused one must not change it
        copied = isinstance(source, PreTrainedModel)
        state |= {f"model.specialists.{name}.{key}": t.clone() if copied else t for key, t in backbone_state.items()}
        # the columns are a view of the whole head, which must not stay while the next specialist is loaded
        del model, columns
    gate = GATES[config.gate](config)
    gate.init_weights()
    return state | {"lm_head.weight": head} | {f"model.fusion_gate.{key}": t for key, t in gate.state_dict().items()}


def assemble(cls: type[PreTrainedModel], plan: FusionPlan, state: dict[str, Tensor], **options) -> PreTrainedModel:
    """Builds the fused model of a plan from its tensors.

    Args:
        cls: Of the fused model.
        plan: What was fused.
        state: Tensors by name. They become the model's.
        **options: Of `from_pretrained`: `device_map`, `attn_implementation`.

    Raises:
        ValueError: If the tensors are not the model's, or a base of adapters does more than to read rows one by one.
    """
    config, generation_config = plan.config, plan.generation_config
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, field, getattr(generation_config, field))
    config.dtype = plan.dtype
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=plan.dtype, output_loading_info=True, **options
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise Refusal(
            f"{sorted(info['missing_keys'])[:3]} are missing and {sorted(info['unexpected_keys'])[:3]} have no place",
            "The fused model must hold exactly its specialists' tensors",
            f"This is a defect: please report the specialists' architectures {[c.model_type for c in config.specialists]}.",
            about="architecture",
        )
    model.generation_config = generation_config
    model.eval()
    # what a device map has left on the disk cannot be merged
    if not any(p.is_meta for p in model.parameters()):
        model.model.reader.probe(tolerance(plan.dtype))
    return model


def load_specialist(name: str, source, config: PreTrainedConfig, dtype: torch.dtype | None, **hub) -> PreTrainedModel:
    """Loads one specialist of a checked plan as a causal language model. The arguments are those of the plan.

    Raises:
        ValueError: If its weights cannot be read.
    """
    if isinstance(source, PreTrainedModel):
        cast = any(b.is_floating_point() and b.element_size() < 4 for b in source.buffers())
        if dtype in (None, source.dtype) and not cast:
            return source
        # loading keeps in float32 what `.to(dtype)` would round, or has rounded, such as rotary frequencies
        with no_bars():
            loaded = type(source).from_pretrained(
                None, config=copy.deepcopy(config), state_dict=source.state_dict(), dtype=dtype or source.dtype
            )
        loaded.generation_config = source.generation_config
        return loaded.to(source.device)
    if is_gguf(source):
        # no type is written in it that all its weights have
        folder, file = gguf_arguments(source)
        with in_words(f"The specialist {name!r}", source):
            model, info = auto_class(name, config).from_pretrained(
                folder, **file, **dequantised(), dtype=dtype or torch.float32, output_loading_info=True
            )
        odd = (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        refuse_other_tensors(f"{name!r} ({os.fspath(source)!r})", *odd)
        model.config = config
        return model
    with in_words(f"The specialist {name!r}", source):
        return auto_class(name, config).from_pretrained(
            source, config=config, dtype=dtype or "auto", use_safetensors=True, **hub
        )
