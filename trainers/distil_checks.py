"""Checks of a student and its teacher before anything is trained, and a student made of a specialist."""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_ultrafuser.fusions_ultrafuser import check_loss
from modeling_ultrafuser.refusals_ultrafuser import Refusal

from .distil_config import DistilConfig


FUSED = "ultrafuser"


def loaded(model: PreTrainedModel | str, args: DistilConfig, settings: dict | None) -> PreTrainedModel:
    """Returns a model, loaded if it is a folder or a Hub id; in float32 if `settings` do not say otherwise."""
    if not isinstance(model, str):
        return model
    chosen = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **(settings or {})}
    return AutoModelForCausalLM.from_pretrained(model, **chosen)


def student_of(teacher: PreTrainedModel, name: str) -> PreTrainedModel:
    """Copies a specialist of a fused model in float32, as a student that shares nothing with its teacher.

    Raises:
        KeyError: If there is no specialist of that name.
        Refusal: If its weights are quantised.
    """
    specialist = teacher.specialist(name)
    if getattr(teacher, "hf_quantizer", None) is not None:
        raise Refusal(
            f"the specialist {name!r} is quantised",
            "A student's weights are trained, which quantised ones cannot be",
            "Load the teacher without `quantization_config`, or give the student's own folder.",
            about="weights",
        )
    student = type(specialist)(copy.deepcopy(specialist.config))
    student.load_state_dict(specialist.state_dict())
    student.generation_config = copy.deepcopy(specialist.generation_config)
    return student.float()


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, args: DistilConfig, domains: Sequence[str]) -> None:
    """Rejects a student that cannot learn from the teacher.

    Raises:
        ValueError: With the fact, the rule and the way out.
    """
    if not isinstance(args, DistilConfig):
        raise ValueError(
            f"DistilTrainer reads its settings from a DistilConfig, but got a {type(args).__name__}. It takes the same "
            f"fields and has defaults of its own: DistilConfig(output_dir, ...)."
        )
    if student.config.model_type == FUSED:
        raise Refusal(
            "the student is a fused model",
            "A student is one ordinary model, so that any engine runs it",
            "Name one of the specialists, or train the fused model itself: `ultrafuser train --stage joint`.",
        )
    if teacher.config.model_type == FUSED:
        check_loss(teacher.config)
    rows, its = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if rows != its:
        raise Refusal(
            f"the student's vocabulary has {rows} rows, and the teacher's has {its}",
            "A teacher's prediction is one number for each token, so the student must have the same tokens",
            f"Take a student of the same tokenizer; if only its padding rows differ, `student.resize_token_embeddings({its})`.",
            about="vocabulary",
        )
    if its_storage := {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}:
        raise Refusal(
            f"{len(its_storage)} tensors of the student are the teacher's own",
            "Training the student would move its teacher",
            "Copy it: `trainers.distil_checks.student_of(teacher, name)`.",
            about="weights",
        )
    if args.by_label:
        _check_labels(teacher, domains)


def _check_labels(teacher: PreTrainedModel, domains: Sequence[str]) -> None:
    names = teacher.config.specialist_names if teacher.config.model_type == FUSED else []
    if not set(domains) <= set(names):
        raise Refusal(
            f"the domains are {list(domains)}, and the teacher's specialists are {list(names)}",
            "With `by_label` each domain is taught by the specialist of its name",
            "Rename the domains, or leave `by_label` out: the fused model needs no labels.",
            about="specialists",
        )
