"""Draws the study at a real size."""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.real_averages import FUSED, SPECIALISTS, Estimate, parts, results, share
from ultrafuser.reports.colours import PALETTE
from ultrafuser.reports.plots import save


ROW = 0.3  # inches
OTHER = "#7d8590"


def write(folder: Path) -> None:
    """Draws what every contender solves, from a folder of results."""
    found = results(folder)
    asked = parts(found)
    save(folder / "solved", draw_shares, {n: {p: share(own, p) for p in asked} for n, own in found.items()}, asked)


def draw_shares(shares: dict[str, dict[str, Estimate | None]], asked: list[str]) -> Figure:
    """Draws the share of every part that each contender solves, with intervals: a panel for each part, a row for each contender.

    Args:
        shares: Contender to part to share; None where it was not asked.
        asked: Parts in order.
    """
    figure = Figure(figsize=(3.2 + 1.25 * len(asked), 1.2 + ROW * len(shares)), layout="constrained")
    axes = figure.subplots(1, len(asked), sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, asked, strict=True):
        for place, (name, own) in enumerate(shares.items()):
            if own[part]:
                axis.hlines(place, 100 * own[part].low, 100 * own[part].high, color=_colour(name), linewidth=2)
                axis.plot(100 * own[part].value, place, "o", color=_colour(name), markersize=5)
        axis.set_title(part.replace("school ", "school,\n"), fontsize="small")
        axis.set_xlim(-3, 103)
        axis.set_xticks([0, 50, 100])
    axes[0].set_yticks(range(len(shares)), list(shares))
    axes[0].set_ylim(len(shares) - 0.5, -0.5)
    figure.supxlabel("solved, %, with 95 % of resampled questions", fontsize="medium")
    return figure


def _colour(name: str) -> str:
    if name.startswith(FUSED):
        return PALETTE[0]
    return PALETTE[1] if name in SPECIALISTS.values() else OTHER
