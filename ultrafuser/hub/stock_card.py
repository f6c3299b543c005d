"""The card of an ordinary model that was made of specialists' weights."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .. import licences
from ..atomic import write_whole
from ..plain import markdown, plain


def write_stock_card(
    folder: Path, template: Path, tag: str, title: str, ingredients: list[licences.Ingredient], **fields: object
) -> None:
    """Writes `README.md` into a model's folder, with metadata in the Hub's form.

    Args:
        folder: The model's.
        template: Of the card, in Jinja.
        tag: How it was made, for those who search the Hub.
        title: Of the card.
        ingredients: Specialists and base, with their licences.
        fields: What else the template shows.
    """
    card = ModelCard.from_template(
        ModelCardData(
            model_name=title,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["ultrafuser", tag],
            base_model=sorted({i.model for i in ingredients if i.model}) or None,
            **licences.common_licence(ingredients),
        ),
        template_path=str(template),
        title=title,
        names=[f"{i.name} ({markdown(i.model or 'not stated')}, {markdown(i.stated)})" for i in ingredients],
        warnings=[markdown(warning) for warning in licences.warnings(ingredients)],
        **fields,
    )
    write_whole(folder / "README.md", plain(re.sub(r"\n{3,}", "\n\n", str(card))).rstrip() + "\n")
