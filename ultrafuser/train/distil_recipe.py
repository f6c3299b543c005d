"""Distillation of a fused folder into one ordinary model's folder, from a recipe: what `ultrafuser distil` does."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.fusions_ultrafuser import check_loss
from modeling_ultrafuser.refusals_ultrafuser import UnavailableError
from trainers.distil_checks import student_of
from trainers.distil_config import DistilConfig
from trainers.distil_trainer import DistilTrainer
from trainers.progress import ProgressOfTraining

from ..hub.student_card import write_student_card
from ..pretrained import check_there, fused_config, load_model, read_tokenizer, save_tokenizer
from .stage_recipe import FusedArguments, load_domains, parse_fields, writing


@dataclass
class DistilArguments:
    """Given in the YAML recipe, beside the fields of `DistilConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the fused model that teaches, or its id on the Hub."}
    )
    student: str | None = field(
        default=None,
        metadata={"help": "Name of a specialist in it, or folder or Hub id of any model of the same tokenizer."},
    )
    domains: dict[str, Any] | None = field(
        default=None, metadata=FusedArguments.__dataclass_fields__["domains"].metadata
    )


def parse(arguments: list[str], recipe: Path | None = None) -> tuple[DistilArguments, DistilConfig]:
    """Reads settings from a recipe, and from a command line, which goes before it. See `parse_fields`."""
    chosen, args = parse_fields(arguments, (DistilArguments, DistilConfig), recipe)
    for name, option in (("model_name_or_path", "--model FOLDER"), ("student", "--student NAME")):
        if not isinstance(getattr(chosen, name), str):
            raise ValueError(f"A student learns from a fused model, but `{name}` is not given. Say it: {option}.")
    return chosen, args


def distil(chosen: DistilArguments, args: DistilConfig) -> None:
    """Distils a fused model, and saves the student as a folder that any engine loads.

    Args:
        chosen: Who teaches whom, on which data.
        args: Settings of the distillation. With `resume_from_checkpoint` it goes on from there; "True" is the last
            complete checkpoint.

    Raises:
        FileExistsError: If the output folder holds a run already, and is not to be gone on with.
        ValueError: If something given does not fit.
        OSError: If a model or data cannot be read.
    """
    # before anything large is loaded
    config, tokenizer = fused_config(chosen.model_name_or_path), read_tokenizer(chosen.model_name_or_path)
    check_loss(config)
    if chosen.student not in config.specialist_names:
        _check_student(chosen.student, config)
        check_tokenizer(chosen.student, config, tokenizer)
    with writing(args, "distil"):
        domains = load_domains(chosen, args.dataset_text_field)
        teacher = UltraFuserForCausalLM.from_pretrained(
            chosen.model_name_or_path, **(args.teacher_model_init_kwargs or {})
        )
        student = _student(chosen.student, teacher, args)
        trainer = DistilTrainer(student, teacher, args, domains, processing_class=tokenizer)
        for shown in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(shown)
        trainer.add_callback(ProgressOfTraining("distilling"))
        resume = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=resume == "True" or resume)
        if args.should_save:
            _save(trainer, chosen, config)


def _check_student(student: str, config: UltraFuserConfig) -> None:
    try:
        check_there(student)
    except UnavailableError as error:
        raise UnavailableError(
            f"there is no student {student!r}: neither a specialist of {config.specialist_names}, nor a folder, nor an id on the Hub",
            "",
            "Check the spelling.",
        ) from error


def check_tokenizer(student: str, config: UltraFuserConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rejects a student whose tokens mean something else.

    Raises:
        ValueError: If they do, or it has no tokenizer.
        OSError: If it cannot be read.
    """
    common_tokenizer(
        {"the teacher": tokenizer, "the student": student}, chat_template="the teacher", vocab_size=config.vocab_size
    )


def _student(source: str, teacher: UltraFuserForCausalLM, args: DistilConfig) -> PreTrainedModel:
    if source in teacher.config.specialist_names:
        return student_of(teacher, source)
    return load_model(source, **{"dtype": torch.float32, **(args.model_init_kwargs or {})})


def _save(trainer: DistilTrainer, chosen: DistilArguments, config: UltraFuserConfig) -> None:
    """Writes the student; its weights last: killed in between, nothing that loads is left."""
    out, student = Path(trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
    save_tokenizer(out, trainer.processing_class)
    write_student_card(out, Path(chosen.model_name_or_path), chosen.student, config, trainer)
    # training turns it off
    student.config.use_cache = True
    student.save_pretrained(out)
