"""The card of a model that was merged from specialists."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .. import licences
from ..atomic import write_whole
from ..merge.coefficients import Coefficients
from ..plain import markdown, plain


TEMPLATE = Path(__file__).parent / "merge_card.jinja"


def write_merge_card(
    folder: Path, title: str, ingredients: list[licences.Ingredient], method: str, coefficients: Coefficients
) -> None:
    """Writes `README.md` into a merged model's folder, with metadata in the Hub's form.

    Args:
        folder: The merged model's.
        title: Of the card.
        ingredients: Specialists and base, with their licences.
        method: How they were merged.
        coefficients: Factors of the specialists.
    """
    card = ModelCard.from_template(
        ModelCardData(
            model_name=title,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["ultrafuser", "merge"],
            base_model=sorted({i.model for i in ingredients if i.model}) or None,
            **licences.common_licence(ingredients),
        ),
        template_path=str(TEMPLATE),
        title=title,
        method=method,
        names=[f"{i.name} ({markdown(i.model or 'not stated')}, {markdown(i.stated)})" for i in ingredients],
        columns=coefficients.names,
        rows=_rows(coefficients),
        warnings=[markdown(warning) for warning in licences.warnings(ingredients)],
    )
    write_whole(folder / "README.md", plain(re.sub(r"\n{3,}", "\n\n", str(card))).rstrip() + "\n")


def _rows(coefficients: Coefficients) -> list[list[str]]:
    """Returns rows of the table of coefficients; one, if all are the same."""
    rows = {name: [f"{number:.4g}" for number in row.values()] for name, row in coefficients.as_dict().items()}
    shown = {"all": next(iter(rows.values()))} if coefficients.is_even else rows
    return [[name, *cells] for name, cells in shown.items()]
