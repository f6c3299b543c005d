"""Searches for the coefficients of a merge, on rows of text."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from modeling_ultrafuser.refusals_ultrafuser import Refusal
from trainers.progress import Progress

from ..evaluation.measurement import HeldOut, mean_loss
from ..pretrained import load_model
from .coefficients import Coefficients
from .merge_base import Merge
from .merged_folder import FolderMerge
from .search_map import Search, map_search, points_of
from .search_simplex import simplex_search


SEARCHES: dict[str, Callable[..., Search]] = {
    "map": map_search,
    "simplex": simplex_search,
}


def check(how: str, method: Merge) -> None:
    """Refuses what is no name in `SEARCHES`, and shares of changes that are not added up.

    Raises:
        Refusal: With the names, or the method to choose.
    """
    if how not in SEARCHES:
        raise Refusal(f"the search is {how!r}", "It has a name", f"Choose one of {sorted(SEARCHES)}.")
    if SEARCHES[how] is simplex_search and not (method.adds and method.scales):
        raise Refusal(
            f"the search is {how!r}, and the method does more than add up changes times their factors",
            "Shares of data are told from base + sum of share times change",
            "Choose --method task_arithmetic.",
        )


def search(merge: FolderMerge, how: str, data: Mapping[str, HeldOut], work: Path) -> Search:
    """Searches one coefficient for each specialist. Every trial is merged, loaded and measured.

    Args:
        merge: The merge, whose coefficients become those that are found.
        how: A name in `SEARCHES`.
        data: Rows by domain, which the result is then no longer unseen by.
        work: Folder for a trial's model.

    Raises:
        ValueError: If there is no such search, or none with this method.
    """
    check(how, merge.chosen)
    names, layers = merge.sources.names, merge.sources.layers
    with Progress("searching", points_of(len(names)) + 1) as progress:

        def measure(factors: list[float]) -> dict[str, float]:
            table = Coefficients.constant(dict(zip(names, factors, strict=True)), layers)
            progress.add()
            return _losses(replace(merge, coefficients=table), data, work / "trial")

        found = SEARCHES[how](measure, len(names), seed=merge.seed)
    merge.coefficients = Coefficients.constant(dict(zip(names, found.best.factors, strict=True)), layers)
    return found


def _losses(merge: FolderMerge, data: Mapping[str, HeldOut], folder: Path) -> dict[str, float]:
    folder.mkdir()
    merge.write(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, dtype="auto").to(device)
    losses = {name: mean_loss(model, rows) for name, rows in data.items()}
    shutil.rmtree(folder)
    return losses


def table(found: Search, names: list[str]) -> Table:
    """Shows the front by the fit, and the point that is taken."""
    domains = list(found.best.losses)
    caption = f"nats per token; the fit misses measured losses by {found.error:.3f} (root mean square)"
    what = "share" if found.shares else "factor"
    shown = Table("", *(f"{what} of {name}" for name in names), *domains, "mean", caption=caption)
    for point in (*found.front, found.best):
        label = "taken, measured" if point is found.best else "by the fit"
        numbers = [f"{factor:.2f}" for factor in point.factors]
        numbers += [f"{loss:.3f}" for loss in (*point.losses.values(), point.mean)]
        shown.add_row(label, *numbers)
    return shown


def recipe(found: Search, names: list[str]) -> str:
    """Writes shares as the mix of a training recipe, whose domains are named as the specialists."""
    shares = ", ".join(f"{name}: {share:.3f}" for name, share in zip(names, found.best.factors, strict=True))
    return f"mix: fixed\nmix_weights: {{{shares}}}"
