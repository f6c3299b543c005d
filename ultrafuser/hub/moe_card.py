"""The card of a mixture of experts that was made of specialists."""

from collections.abc import Mapping
from pathlib import Path

from .. import licences
from .stock_card import write_stock_card


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
    table = {
        "columns": list(next(iter(losses.values()))),
        "rows": [[name, *(f"{loss:.3f}" for loss in of.values())] for name, of in losses.items()],
    }
    write_stock_card(folder, TEMPLATE, "moe", title, ingredients, layout=layout, shared=shared, **table)
