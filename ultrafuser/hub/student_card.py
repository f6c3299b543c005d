"""The card of a student that was distilled from a fused model."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from modeling_ultrafuser import UltraFuserConfig

from .. import licences
from ..atomic import write_whole
from ..plain import markdown, plain
from .model_card import read_licences


TEMPLATE = Path(__file__).parent / "student_card.jinja"
DIVERGENCES = {0.0: "KL(teacher, student)", 1.0: "KL(student, teacher)"}


def write_student_card(out: Path, teacher: Path, student: str, config: UltraFuserConfig, trainer) -> None:
    """Writes `README.md` into a student's folder, with metadata in the Hub's form.

    Args:
        out: The student's folder.
        teacher: The fused model's folder, which says where its specialists come from.
        student: Name of the specialist that the student began as, or its folder or Hub id.
        config: The fused model's configuration.
        trainer: A `DistilTrainer` that has ended.
    """
    ingredients = read_licences(teacher, config.specialist_names)
    own = next((i for i in ingredients if i.name == student), None) or licences.read_ingredient("student", student)
    whole = [*ingredients, *([own] if own not in ingredients else [])]
    card = ModelCard.from_template(
        ModelCardData(
            model_name=out.resolve().name,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["ultrafuser", "distillation"],
            base_model=own.model,
            **licences.common_licence(whole),
        ),
        template_path=str(TEMPLATE),
        title=out.resolve().name,
        student=markdown(own.model or student),
        names=[f"{i.name} ({markdown(i.model or 'not stated')}, {markdown(i.stated)})" for i in ingredients],
        fusion=config.fusion,
        gate=config.gate,
        told=_told(trainer),
        warnings=[markdown(warning) for warning in licences.warnings(whole)],
    )
    write_whole(out / "README.md", plain(re.sub(r"\n{3,}", "\n\n", str(card))).rstrip() + "\n")


def _told(trainer) -> list[str]:
    """Tells how it was distilled, in lines."""
    args = trainer.args
    logged = next((e for e in reversed(trainer.state.log_history) if "loss" in e), {})
    losses = [f"{d} {logged[f'loss/{d}']:.3f}" for d in trainer.drawn if f"loss/{d}" in logged]
    divergence = DIVERGENCES.get(args.beta, f"generalised Jensen-Shannon divergence, beta {args.beta}")
    return [
        f"{trainer.state.global_step} steps of {args.examples_per_domain} examples of each of {', '.join(trainer.domains)}",
        f"answers: {'given' if args.off_policy else 'written by the student'}",
        f"teacher: {'the specialist of each domain' if args.by_label else 'the fused model'}",
        f"loss: {divergence}" + (", scaled by domain" if args.balance_scale else ""),
        *([f"divergence at the end, nats per token: {', '.join(losses)}"] if losses else []),
    ]
