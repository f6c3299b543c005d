"""The card of a model that was merged from specialists."""

from pathlib import Path

from .. import licences
from ..merge.coefficients import Coefficients
from .stock_card import write_stock_card


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
    table = {"columns": coefficients.names, "rows": _rows(coefficients)}
    write_stock_card(folder, TEMPLATE, "merge", title, ingredients, method=method, **table)


def _rows(coefficients: Coefficients) -> list[list[str]]:
    """Returns rows of the table of coefficients; one, if all are the same."""
    rows = {name: [f"{number:.4g}" for number in row.values()] for name, row in coefficients.as_dict().items()}
    shown = {"all": next(iter(rows.values()))} if coefficients.is_even else rows
    return [[name, *cells] for name, cells in shown.items()]
