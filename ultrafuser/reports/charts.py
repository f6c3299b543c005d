"""Charts of the gate, of a comparison and of training, to be drawn with `plots.save`."""

import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .colours import strength, text_on
from .explanation import FUSED, Token, leaders


OTHER = "#7d8590"  # rows that are no specialist: reads on light and on dark
INCH_PER_ROW = 0.3


def draw_gate_by_domain(mean_weights: Mapping[str, Mapping[str, float]], colours: dict[str, str]) -> Figure:
    """Mean gate weight of each specialist, one bar per domain.

    Args:
        mean_weights: Domain to specialist to mean weight, which sum to 1 over specialists unless they are signed. Negative
            ones are left of 0.
        colours: Colour of each specialist.
    """
    domains = list(mean_weights)
    specialists = list(next(iter(mean_weights.values())))
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(domains)), layout="constrained")
    axis = figure.add_subplot()
    low, high = np.zeros(len(domains)), np.zeros(len(domains))
    for name in specialists:
        values = np.array([mean_weights[d][name] for d in domains])
        start = np.where(values < 0, low, high)
        bars = axis.barh(domains, values, left=start, color=colours[name], label=name, height=0.72, linewidth=1)
        # narrower parts have no room for a number
        labels = [f"{v:.2f}" if abs(v) >= 0.06 else "" for v in values]
        axis.bar_label(bars, labels, label_type="center", color=text_on(colours[name]))
        low, high = low + values.clip(max=0), high + values.clip(min=0)
    # shares fill the width, whatever their rounded sum is
    width = (low.min(), max(1, high.max())) if low.any() else (0, 1)
    axis.set(xlim=width, xlabel="mean gate weight", ylabel="tokens of")
    axis.invert_yaxis()
    axis.grid(visible=False)
    _legend(figure)
    return figure


def draw_gate_by_position(
    weights_by_position: Mapping[str, Sequence[Sequence[float]]],
    specialists: Sequence[str],
    bin_tokens: int,
    colours: dict[str, str],
) -> Figure:
    """Mean gate weight of each specialist along a text, one panel per domain.

    Args:
        weights_by_position: Domain to one vector of weights per bin of positions, specialists in order.
        specialists: Their names.
        bin_tokens: Positions in a bin.
        colours: Colour of each specialist.
    """
    figure, axes = _panels(len(weights_by_position), "position in the text, tokens", "mean gate weight")
    drawn = [weight for bins in weights_by_position.values() for weights in bins for weight in weights]
    for axis, (domain, bins) in zip(axes, weights_by_position.items(), strict=True):
        shares = dict(zip(specialists, np.transpose(bins), strict=True))
        _steps(axis, f"tokens of {domain}", np.arange(len(bins) + 1) * bin_tokens, shares, colours)
        # signed weights lie outside
        axis.set(ylim=(min(0, *drawn) - 0.03, max(1, *drawn) + 0.03))
    _shared_legend(figure, axes)
    return figure


def draw_gate_entropy(entropy: Mapping[str, float], specialists: int, colours: dict[str, str]) -> Figure:
    """Draws the gate's entropy, one bar per domain.

    Args:
        entropy: Domain to mean entropy of the gate weights, in nats.
        specialists: How many there are. Equal weights for all have the largest entropy, which is marked.
        colours: Colour of each domain.
    """
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(entropy)), layout="constrained")
    axis = figure.add_subplot()
    bars = axis.barh(list(entropy), list(entropy.values()), color=[colours[d] for d in entropy], height=0.65)
    axis.bar_label(bars, [f"{v:.2f}" for v in entropy.values()], padding=4)
    most = math.log(specialists)
    axis.axvline(most, color=_ink(), linestyle=(0, (4, 3)), linewidth=1.2)
    label = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "center"}
    axis.annotate("equal weights", (most, 0.5), (-6, 0), **label)
    axis.set(xlim=(0, 1.04 * most), xlabel="mean entropy of the gate weights, nats", ylabel="tokens of")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    return figure


def draw_rows(rows: Sequence[Mapping], colours: dict[str, str]) -> Figure:
    """Loss of every row of a comparison, overall and by domain, with intervals where there are any.

    Args:
        rows: With `name`, `kind`, `mean` and `loss` by domain, and perhaps `mean_interval` and `loss_interval`.
        colours: Colour of each specialist.
    """
    domains = list(dict.fromkeys(d for row in rows for d in row["loss"]))
    figure = Figure(figsize=(2.8 + 1.9 * (1 + len(domains)), 1.2 + INCH_PER_ROW * len(rows)), layout="constrained")
    axes = figure.subplots(1, 1 + len(domains), sharey=True, squeeze=False)[0]
    means = [(row["mean"], row.get("mean_interval")) for row in rows]
    _bars(axes[0], "mean of domains", rows, means, colours)
    for axis, domain in zip(axes[1:], domains, strict=True):
        values = [(row["loss"].get(domain), row.get("loss_interval", {}).get(domain)) for row in rows]
        _bars(axis, domain, rows, values, colours)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel("held-out loss, nats per token: shorter is better", fontsize="medium")
    return figure


def draw_differences(rows: Sequence[Mapping], colours: dict[str, str]) -> Figure:
    """Draws every row's difference to the fused model, with intervals.

    Args:
        rows: As for `draw_rows`, with `difference` and perhaps `difference_interval`.
        colours: Colour of each specialist.
    """
    others = [row for row in rows if row["name"] != FUSED and row.get("difference") is not None]
    figure = Figure(figsize=(8.5, 1.5 + INCH_PER_ROW * len(others)), layout="constrained")
    axis = figure.add_subplot()
    for place, row in enumerate(others):
        colour, low_high = _colour(row, colours), row.get("difference_interval")
        if low_high:
            axis.hlines(place, *low_high, color=colour, linewidth=2.5)
        axis.plot(row["difference"], place, "o", color=colour, markersize=7)
    axis.axvline(0, color=_ink(), linewidth=1.2)
    # a hopeless baseline would press all others together
    axis.set_xscale("symlog", linthresh=0.1, linscale=1)
    axis.margins(x=0.06)
    low, high = axis.get_xlim()
    ticks = [t for t in (-10, -1, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:+g}" if t else "0" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(others)), [row["name"] for row in others])
    axis.set_ylim(len(others) - 0.5, -0.5)
    axis.set_xlabel("loss minus the fused model's, nats per token\n← better than fused   |   worse than fused →")
    return figure


def draw_radar(rows: Sequence[Mapping], colours: dict[str, str]) -> Figure:
    """The fused model, its specialists and the best other row, on every domain (Ding et al., 2024, Figure 1).

    An axis shows exp(best loss - loss): the mean probability of a token relative to the best row's, which lies on
    the outer ring; the rings are 1/4 apart.

    Args:
        rows: As for `draw_rows`.
        colours: Colour of each specialist.

    Raises:
        ValueError: If there are fewer than three domains, which span no area.
    """
    domains = list(dict.fromkeys(d for row in rows for d in row["loss"]))
    if len(domains) < 3:
        raise ValueError(f"A radar chart needs three axes or more, but the rows have the domains {domains} only.")
    others = [row for row in rows if row["name"] != FUSED and row["kind"] != "specialist"]
    best = min(others, key=lambda row: row["mean"], default=None)
    shown = [row for row in rows if row["name"] == FUSED or row["kind"] == "specialist" or row is best]
    floors = [min(row["loss"][d] for row in shown if d in row["loss"]) for d in domains]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    angles = np.linspace(0, 2 * math.pi, len(domains), endpoint=False)
    for row in shown:
        values = [math.exp(f - row["loss"].get(d, math.inf)) for d, f in zip(domains, floors, strict=True)]
        colour, fused = _colour(row, colours), row["name"] == FUSED
        style = {"color": colour, "linewidth": 3 if fused else 2, "linestyle": (0, (4, 2)) if row is best else "-"}
        axis.plot([*angles, angles[0]], [*values, values[0]], **style, label=row["name"])
        axis.fill(angles, values, color=colour, alpha=0 if row is best else 0.08)
    axis.set_xticks(angles, domains)
    axis.set_yticks([0.25, 0.5, 0.75, 1], [])
    axis.set_ylim(0, 1.02)
    axis.spines["polar"].set_visible(False)
    axis.tick_params(axis="x", pad=8)
    _legend(figure, columns=2)
    return figure


def draw_tokens(tokens: Sequence[Token], colours: dict[str, str], *, columns: int = 96) -> Figure:
    """A text coloured by who speaks, as on the page.

    Args:
        tokens: What `explain` gives.
        colours: Colour of each specialist.
        columns: Characters after which a line is broken.
    """
    pieces = list(_set_type(tokens, columns))
    rows, names = pieces[-1][0] + 1, list(tokens[-1].weights)
    # a monospaced character of 10 points is 6 points wide
    figure = Figure(figsize=(columns * 6.02 / 72, (rows + 2) * 0.22))
    axis = figure.add_axes((0, 0, 1, rows / (rows + 2)), xlim=(0, columns), ylim=(rows, 0))
    axis.set_axis_off()
    for row, column, piece, token, leader in pieces:
        if leader:
            paint = {"facecolor": colours[leader], "edgecolor": "none"}
            alpha = strength(token.weights[leader], len(names))
            axis.add_patch(Rectangle((column, row + 0.04), len(piece), 0.86, alpha=alpha, **paint))
            axis.add_patch(Rectangle((column, row + 0.9), len(piece), 0.06, **paint))
        # the space before a word is left out, as SVG would
        start = column + len(piece) - len(piece.lstrip())
        axis.text(start, row + 0.5, piece.strip(), family="monospace", fontsize=10, va="center_baseline")
    swatches = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(swatches, names, loc="upper left", ncols=len(names), borderpad=0)
    return figure


def _set_type(tokens: Sequence[Token], columns: int) -> Iterator[tuple[int, int, str, Token, str | None]]:
    """Row, column and text of every piece of a line that is one token's, with that token and who leads there."""
    row = column = 0
    for token, leader in zip(tokens, leaders(tokens), strict=True):
        for number, line in enumerate(token.text.split("\n")):
            if number:
                row, column = row + 1, 0
            while line:
                if column == columns:
                    row, column = row + 1, 0
                piece, line = line[: columns - column], line[columns - column :]
                yield row, column, piece, token, leader
                column += len(piece)


def draw_losses(runs: Mapping[str, Sequence[Mapping]], colours: dict[str, str]) -> Figure:
    """Training loss over steps, one panel per run: over all tokens, and by domain where that was logged.

    Args:
        runs: Name to a trainer's `log_history`, or any list of entries with `step` and `loss`, and perhaps
            `loss/text`, ... Other entries are passed over.
        colours: Colour of each domain.
    """
    figure, axes = _panels(len(runs), "optimizer step", "loss, nats per token")
    for axis, (name, history) in zip(axes, runs.items(), strict=True):
        lines = {domain: (f"loss/{domain}", colour) for domain, colour in colours.items()}
        for label, (key, colour) in {**lines, "all": ("loss", _ink())}.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=label)
        axis.set_title(name)
    _shared_legend(figure, axes)
    return figure


def draw_mixes(
    runs: Mapping[str, Sequence[tuple[int, Sequence[float]]]],
    domains: Sequence[str],
    steps: int,
    colours: dict[str, str],
) -> Figure:
    """Each mix over time, one panel per run.

    Args:
        runs: Name to (step from which it held, mix) in order.
        domains: Their names, in the order of the mixes.
        steps: Optimizer steps of the runs.
        colours: Colour of each domain.
    """
    figure, axes = _panels(len(runs), "optimizer step", "share of the mix")
    for axis, (name, mixes) in zip(axes, runs.items(), strict=True):
        # a mix that was to begin when the run was over held for no batch
        held = [(step, mix) for step, mix in mixes if step < steps]
        shares = dict(zip(domains, zip(*(mix for _, mix in held), strict=True), strict=True))
        _steps(axis, name, [step for step, _ in held] + [steps], shares, colours)
    _shared_legend(figure, axes)
    return figure


def _steps(axis: Axes, title: str, starts: Sequence[float], shares: Mapping[str, Sequence], colours: dict) -> None:
    """Draws shares over time by name; a share holds up to the next start, of which there is one more."""
    for name, values in shares.items():
        axis.step(starts, [*values, values[-1]], where="post", color=colours[name], label=name)
    axis.set(title=title, ylim=(-0.03, 1.03))


def _panels(number: int, along: str, up: str) -> tuple[Figure, list[Axes]]:
    """Makes small panels that share their axes, three in a row, and what is written along and up."""
    columns = min(number, 3)
    lines = math.ceil(number / columns)
    figure = Figure(figsize=(max(4.5, 2.6 * columns), 1 + 2.1 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for unused in axes[number:]:
        # the panel above it shows the ticks of the column
        axes[axes.index(unused) - columns].tick_params(labelbottom=True)
        unused.remove()
    for axis in axes[:number]:
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel(along, fontsize="medium")
    figure.supylabel(up, fontsize="medium")
    return figure, axes[:number]


def _bars(axis: Axes, title: str, rows: Sequence[Mapping], values: Sequence[tuple], colours: dict[str, str]) -> None:
    """One bar per row, with an interval where there is one."""
    lengths = np.array([math.nan if value is None else value for value, _ in values])
    ends = np.array([low_high or (math.nan, math.nan) for _, low_high in values]).T
    errors = np.clip([lengths - ends[0], ends[1] - lengths], 0, None)
    own = [_colour(row, colours) for row in rows]
    axis.barh(
        range(len(rows)), lengths, xerr=errors, color=own, height=0.7, ecolor=_ink(), error_kw={"elinewidth": 1.4}
    )
    axis.set_title(title)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.grid(visible=False, axis="y")


def _colour(row: Mapping, colours: dict[str, str]) -> str:
    """A specialist's own colour, the ink for the fused model, grey for all others."""
    if row["name"] == FUSED:
        return _ink()
    return colours.get(row["name"].removesuffix(" specialist"), OTHER) if row["kind"] == "specialist" else OTHER


def _shared_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Each label once, whichever panels have it."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    _legend(figure, list(found.values()), list(found))


def _legend(figure: Figure, *handles_labels: list, columns: int = 6) -> None:
    # below, the library would write it over the label that panels share
    figure.legend(*handles_labels, loc="outside upper center", ncols=columns)


def _ink() -> str:
    return matplotlib.rcParams["text.color"]
