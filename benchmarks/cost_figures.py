"""Draws docs/benchmarks/ from the files under results/, and prints their tables as Markdown.

python -m benchmarks.cost_figures

A table stands in docs/benchmarks.md between the marker that is printed above it and `<!-- end -->`.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks import gate_costs, growth, headlines, real_serving, rivals, serving
from ultrafuser.reports.charts import OTHER
from ultrafuser.reports.colours import PALETTE
from ultrafuser.reports.marked_tables import with_tables
from ultrafuser.reports.plots import save


ROOT = Path(__file__).parent.parent
SHAPES = {"small": "bound by operations", "large": "bound by weights"}
QUANTITIES = {"token": "each token", "prompt": "prompt"}


def main() -> None:
    """Every benchmark that has a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    tables = {"results/*.json: headlines": headlines.table(options.results)}
    if (costs := options.results / "gate_costs.json").exists():
        tables["results/gate_costs.json: gates"] = gate_costs.table(json.loads(costs.read_text())["rows"])
    shown = {"rivals": show_rivals, "growth": show_growth, "serving": show_serving, "real_serving": show_real_serving}
    for name, show in shown.items():
        file = options.results / f"{name}.json"
        if file.exists():
            found = show(json.loads(file.read_text()), options.out)
            tables |= {f"results/{name}.json: {what}": table for what, table in found.items()}
        else:
            print(f"There is no {file}: `python -m benchmarks.{name}` writes it.")
    for marker, table in tables.items():
        print(f"\n<!-- {marker} -->\n\n{table}\n\n<!-- end -->")
    page = options.out.with_suffix(".md")
    if page.exists():
        page.write_text(with_tables(page.read_text(), lambda path, name: tables[f"{path}: {name}"]))


def show_rivals(result: dict, out: Path) -> dict[str, str]:
    """Ours and rivals, one table per shape."""
    save(out / "rivals", draw_rivals, {title: result[name] for name, title in SHAPES.items()})
    return {name: rivals.table(result[name]) for name in SHAPES}


def show_growth(result: dict, out: Path) -> dict[str, str]:
    """Cost against specialists, batch, context and vocabulary, one table for each in each shape."""
    for quantity in QUANTITIES:
        save(out / f"growth_{quantity}", draw_growth, result, quantity)
    return {f"{n}, {what}": growth.table(what, p) for n in SHAPES for what, p in result[n].items()}


def show_serving(result: dict, out: Path) -> dict[str, str]:
    """Throughput against batch, one table per model."""
    models = {name: result[name] for name in ("quickstart", "random")}
    save(out / "serving", draw_serving, models)
    return {name: serving.table(found) for name, found in models.items()}


def show_real_serving(result: dict, out: Path) -> dict[str, str]:
    """Prefill and decoding at a real size, one table each."""
    return {what: real_serving.table(result, what) for what in ("prefill", "decoding")}


def draw_rivals(regimes: dict[str, dict]) -> Figure:
    """Every way's time relative to one specialist, from least to most over rounds: a token filled, a prompt hollow.

    Args:
        regimes: Title to what `rivals.measure_rivals` returns.
    """
    names = list(dict.fromkeys(name for found in regimes.values() for name in found))
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    for axis, (title, found) in zip(axes, regimes.items(), strict=True):
        for name, row in found.items():
            ours = name.startswith("fused")
            colour = matplotlib.rcParams["text.color"] if ours else OTHER
            for quantity, shift, filled in (("token", -0.12, True), ("prompt", 0.12, False)):
                numbers, place = row[quantity], names.index(name) + shift
                axis.plot([numbers["least"], numbers["most"]], [place, place], color=colour, linewidth=1.4)
                face = colour if filled else matplotlib.rcParams["patch.edgecolor"]
                axis.plot(numbers["median"], place, "o", markersize=5, color=colour, markerfacecolor=face)
        axis.set(title=title, xscale="log")
        plain_ticks(axis, (0.5, 1, 2, 3, 5, 10))
        axis.axvline(1, color=OTHER, linestyle=(0, (4, 3)), linewidth=1)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("time relative to one specialist: each token (filled), prompt (hollow)", fontsize="medium")
    return figure


def draw_growth(result: dict, quantity: str) -> Figure:
    """Cost relative to one specialist against what is varied, with that of running N models as a dashed line.

    Args:
        result: What `growth` writes.
        quantity: "token" or "prompt".
    """
    shapes = {name: title for name, title in SHAPES.items() if name in result}
    varied = list(next(iter(result[name] for name in shapes)))
    size = (2.5 * len(varied) + 0.6, 2.3 * len(shapes) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shapes), len(varied), sharey="row", squeeze=False)
    for row, (name, title) in zip(grid, shapes.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, what in zip(row, varied, strict=True):
            points = {int(value): found for value, found in result[name][what].items()}
            expected = list(points) if what == "specialists" else [result["usual"]["specialists"]] * len(points)
            axis.plot(list(points), expected, color=OTHER, linestyle=(0, (4, 3)), linewidth=1.2, label="N times")
            for way, colour in zip(("fused", "fused, stacked"), PALETTE, strict=False):
                numbers = [found[way][quantity] for found in points.values()]
                axis.plot(list(points), [n["median"] for n in numbers], "o-", markersize=4, color=colour, label=way)
                low_high = ([n[end] for n in numbers] for end in ("least", "most"))
                axis.fill_between(list(points), *low_high, color=colour, alpha=0.2, linewidth=0)
            axis.set_xlabel(what)
            axis.set_ylim(bottom=0)
            if what == "specialists":
                axis.plot(1, 1, "o", markersize=4, color=OTHER)  # one alone is what all is relative to
                axis.set_xticks([1, *points])
            else:
                axis.set_xscale("log", base=2)
                plain_ticks(axis, list(points))
    figure.supylabel(f"{QUANTITIES[quantity]}, relative to one specialist", fontsize="medium")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def draw_serving(models: dict[str, dict]) -> Figure:
    """Tokens per second against the batch: colours are libraries, lines are models.

    Args:
        models: Title to what `serving.measure_throughput` returns.
    """
    figure = Figure(figsize=(4.2 * len(models), 3.8), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    libraries = dict(zip(("transformers", "vLLM"), PALETTE, strict=False))
    lines = {"fused": "-", "fused, stacked": (0, (5, 2)), "one specialist": (0, (1, 1.5))}
    for axis, (title, found) in zip(axes, models.items(), strict=True):
        batches = [int(batch) for batch in found]
        for way in next(iter(found.values())):
            model, library = way.rsplit(", ", 1)
            speeds = [row[way]["value"] for row in found.values()]
            axis.plot(batches, speeds, "o", linestyle=lines[model], color=libraries[library], markersize=4, label=way)
        axis.set(title=title, xlabel="batch", xscale="log", yscale="log")
        plain_ticks(axis, batches)
        axis.yaxis.set_major_formatter(ScalarFormatter())
    axes[0].set_ylabel("tokens per second")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def plain_ticks(axis: Axes, places: list[int] | tuple[float, ...]) -> None:
    """Numbers as they are on a logarithmic axis."""
    axis.set_xticks(places, [f"{place // 1024}k" if place >= 2048 else f"{place:g}" for place in places])
    axis.xaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
