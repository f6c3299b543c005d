"""The card of a mixture of experts that was made of specialists."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .. import licences
from ..atomic import write_whole
from ..plain import markdown, plain


TEMPLATE = Path(__file__).parent / "moe_card.jinja"


def write_moe_card(
    folder: Path,
    title: str,
    ingredients: list[licences.Ingredient],
    layout: str,
    shared: str,
    losses: Mapping[str, Mapping[str, float]],
) -> None:
    """Writes `README.md` into a mixture's folder, with metadata in the Hub's form.

    Args:
        folder: The mixture's.
        title: Of the card.
        ingredients: Specialists and base, with their licences.
        layout: A name in `LAYOUTS`.
        shared: Name of the donor, or method, of what the experts share.
        losses: By domain, of each model that was measured.
    """
    card = ModelCard.from_template(
        ModelCardData(
            model_name=title,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["ultrafuser", "moe"],
            base_model=sorted({i.model for i in ingredients if i.model}) or None,
            **licences.common_licence(ingredients),
        ),
        template_path=str(TEMPLATE),
        title=title,
        layout=layout,
        shared=shared,
        names=[f"{i.name} ({markdown(i.model or 'not stated')}, {markdown(i.stated)})" for i in ingredients],
        columns=list(next(iter(losses.values()))),
        rows=[[name, *(f"{loss:.3f}" for loss in of.values())] for name, of in losses.items()],
        warnings=[markdown(warning) for warning in licences.warnings(ingredients)],
    )
    write_whole(folder / "README.md", plain(re.sub(r"\n{3,}", "\n\n", str(card))).rstrip() + "\n")
