"""Checks of a stage before it trains: its settings, its model, and whether they go together."""

import warnings
from collections.abc import Mapping, Sequence

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_ultrafuser.fusions_ultrafuser import check_loss
from modeling_ultrafuser.gate_base_ultrafuser import Reads

from .mix.rewards import REWARDS
from .mixed import MIXED
from .stage_config import StageConfig


# settings that add something to the loss of each token
TERMS = ("gate_entropy", "gate_balance", "gate_domain", "gate_scale", "mix_importance")


def loaded(model: PreTrainedModel | str, args: StageConfig, config: type[StageConfig], name: str) -> PreTrainedModel:
    """Returns the model that a stage trains, loaded if `model` is a folder or a Hub id.

    Raises:
        ValueError: If the settings are another trainer's, or the model has adapters already.
    """
    if not isinstance(args, config):
        raise ValueError(
            f"{name} reads its settings from a {config.__name__}, but got a {type(args).__name__}. It takes the "
            f"same fields and has defaults of its own: {config.__name__}(output_dir, ...)."
        )
    if isinstance(model, str):
        chosen = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        model = AutoModelForCausalLM.from_pretrained(model, **chosen)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{name} decides what is trained, so it adds adapters itself, but got a {type(model).__name__}. Pass the "
            f"model without them and `peft_config=...` (not for stage one), or merge first: `model.merge_and_unload()`."
        )
    return model


def fused_model(
    model: PreTrainedModel | str, args: StageConfig, config: type[StageConfig], name: str
) -> PreTrainedModel:
    """Returns the fused model that a stage trains, see `loaded`.

    Raises:
        ValueError: If the settings are another trainer's, or the model is not a fused one, or its fusion rule has no loss.
    """
    model = loaded(model, args, config, name)
    if model.config.model_type != "ultrafuser":
        raise ValueError(
            f"{name} trains a fused model, but got a {type(model).__name__}. Build one with "
            f"`UltraFuserForCausalLM.from_specialists(...)`, or train a single model with `SingleTrainer`."
        )
    check_loss(model.config)
    return model


def check_domains(args: StageConfig, domains: Sequence[str], specialists: Sequence[str]) -> None:
    """Raises a ValueError if the names of the domains do not fit the settings."""
    if args.mixed_share and MIXED in domains:
        raise ValueError(
            f"Mixed examples are counted as a domain {MIXED!r}, but there is one of that name already. Rename it, or set "
            f"mixed_share=0."
        )
    if set(args.mix_weights or {}) - set(domains):
        raise ValueError(f"`mix_weights` names {sorted(args.mix_weights)}, but the domains are {domains}.")
    if args.gate_groups:
        _check_groups(args.gate_groups, {*domains, *specialists})
    others = [domain for domain in domains if domain not in specialists]
    if others and args.mix_reward is not None and REWARDS[args.mix_reward].needs_specialists:
        raise ValueError(
            f"`mix_reward={args.mix_reward!r}` compares each domain with its own specialist, so domains must be named as "
            f"specialists are, but domains are {domains} and specialists are {specialists}."
        )
    if others and args.gate_domain and args.gate_domain_target == "domain":
        if len(others) == len(domains):
            raise ValueError(
                f"`gate_domain` leads the gate to each domain's own specialist, so domains must be named as specialists are, "
                f"but domains are {domains} and specialists are {specialists}."
            )
        warnings.warn(
            f"No specialist is called {' or '.join(others)}: `gate_domain` leaves rows of that domain to the loss.",
            stacklevel=2,
        )


def _check_groups(groups: Mapping[str, Sequence[str]], names: set[str]) -> None:
    grouped = [name for members in groups.values() for name in members]
    if sorted(grouped) != sorted(names):
        raise ValueError(
            f"`gate_groups` has each specialist and each domain in one group, so that it holds {sorted(names)} once each, but "
            f"it holds {sorted(grouped)}."
        )


def check_quantised(model: PreTrainedModel, stage: str, peft_config) -> None:
    """Raises a ValueError if all weights are quantised, and so have no gradients."""
    method = getattr(model, "quantization_method", None)
    if method is not None and peft_config is None:
        raise ValueError(
            f"Quantised weights learn through adapters beside them, but this model is quantised "
            f"({getattr(method, 'value', method)}) and stage {stage} got no `peft_config`. "
            + (
                "Train the gate before quantising: it takes no more memory than the weights."
                if stage == "gate"
                else "Give it one (--use_peft), or load the model without `quantization_config`."
            )
        )


def is_trl_loss(args: StageConfig, kwargs: Mapping) -> bool:
    """Returns whether terms can be added to the loss, token by token."""
    return not (args.label_smoothing_factor or kwargs.get("compute_loss_func"))


def check_terms(args: StageConfig, model: PreTrainedModel, kwargs: Mapping) -> None:
    """Raises a ValueError if a setting would have no effect, or draws would not be counted."""
    terms = [t for t in TERMS if getattr(args, t)]
    if terms and not is_trl_loss(args, kwargs):
        raise ValueError(
            f"{terms} are added to TRL's own loss, token by token, but `label_smoothing_factor` or `compute_loss_func` "
            f"puts another in its place. Leave one of them out."
        )
    if args.gate_scale and not model.config.gate_calibration:
        raise ValueError(
            f"`gate_scale` is a prior for the temperatures of a gate, but {model.config.gate!r} of this model predicts none. "
            f"Leave it out, or fuse with `+calibration`."
        )
    of_shares = [term for term in terms if term not in ("gate_scale", "mix_importance")]
    if of_shares and model.config.signed_weights is not None:
        raise ValueError(
            f"{of_shares} are terms on shares that sum to 1, but `signed_weights` of this model are "
            f"{model.config.signed_weights}. Leave them out."
        )
    if args.mix_importance and args.loss_type != "nll":
        raise ValueError(f"`mix_importance` weighs log-likelihoods, but loss_type={args.loss_type!r}. Use 'nll'.")
    if args.push_to_hub:
        raise ValueError(
            "`push_to_hub` of a trainer would send all that is in its output folder, cached data and pickled arguments "
            "included. Push the model when it is trained: `ultrafuser push FOLDER OWNER/NAME`."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` would change the batch size in mid-run, but draws are counted in batches. Lower "
            "`per_device_train_batch_size` by hand: the number of accumulated steps follows."
        )
    if args.gate_dropout and Reads.STATES not in model.model.fusion_gate.reads:
        raise ValueError(
            f"`gate_dropout` hides what the gate reads of hidden states, but the gate {model.config.gate!r} reads none. "
            f"Set gate_dropout=0, or train another gate."
        )
