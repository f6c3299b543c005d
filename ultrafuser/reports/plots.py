"""Figures that read on light and on dark paper.

Every `draw_*` function returns a matplotlib `Figure`, and `save(path, draw_..., ...)` draws and writes it:

    save(out / "map", draw_map, tsne(texts), domains, topics)      # map.svg, map.light.png, map.dark.png

The SVG follows the reader's light or dark setting, or inside a web page the text's colour. No global state of matplotlib is
touched. `colours`, wherever it is taken, is what `colours.assign(names)` gives.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .colours import INK, PAPER, assign


LABELS = 5  # topics that a map shows of each domain
STYLE = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    # names may hold a dollar sign
    "text.parse_math": False,
    # text stays text: it can be found, read aloud and scaled
    "svg.fonttype": "none",
    # the same picture gives the same file
    "svg.hashsalt": "ultrafuser",
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
# with its own paper, because a reader's setting and the place where the picture stands may disagree
_ADAPTING = f"""<style>
svg {{ color: {INK["light"]}; --paper: {PAPER["light"]}; background: var(--paper); stroke-linejoin: round }}
@media (prefers-color-scheme: dark) {{ svg {{ color: {INK["dark"]}; --paper: {PAPER["dark"]} }} }}
</style>"""


def save(path: Path, draw: Callable[..., Figure], *args, **kwargs) -> str:
    """Draws a figure and writes `path.svg`, `path.light.png` and `path.dark.png`.

    Args:
        path: Where to, without an ending.
        draw: A function of this module.
        *args: Passed on to it.
        **kwargs: Passed on to it.

    Returns:
        The SVG to stand inside a web page: without a style or a background of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = io.StringIO()
    for theme in ("light", "dark"):
        with matplotlib.rc_context(_style(theme)), warnings.catch_warnings():
            # a character that no font has here is a box in the PNG, and itself in the SVG
            warnings.filterwarnings("ignore", "Glyph", UserWarning)
            figure = draw(*args, **kwargs)
            figure.savefig(f"{path}.{theme}.png", dpi=160, facecolor=PAPER[theme])
            if theme == "light":
                figure.savefig(written, format="svg", facecolor="none", metadata={"Date": None})
    svg = _adapting(written.getvalue())
    Path(f"{path}.svg").write_text(svg.replace("<defs>", f"{_ADAPTING}\n<defs>", 1))
    return svg[svg.index("<svg") :]


def _style(theme: str) -> dict:
    return {**STYLE, **dict.fromkeys((*_INKED, "grid.color"), INK[theme]), "patch.edgecolor": PAPER[theme]}


def _adapting(svg: str) -> str:
    """Colours of light paper, made to follow the surroundings; no names that could clash with another figure's."""
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace(INK["light"], "currentColor").replace(PAPER["light"], "var(--paper)")
    # where the library takes black for granted it writes no colour at all
    return svg.replace("<svg ", '<svg fill="currentColor" ', 1)


def draw_map(points: np.ndarray, domains: Sequence[str], topics: Sequence[str] | None = None) -> Figure:
    """Texts as points, one colour per domain (Ding et al., 2024, Figure 3).

    Args:
        points: Places, for example from `tsne`. Shape (texts, 2).
        domains: Domain of each text.
        topics: Topic of each text. The `LABELS` most frequent ones of each domain are written where their texts lie,
            but for those that would cover another one.
    """
    colours = assign(domains)
    domains = np.asarray(domains)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.add_subplot()
    axis.set_axis_off()
    for domain, colour in colours.items():
        own = points[domains == domain]
        # many points as vectors make a file that no browser likes
        axis.scatter(*own.T, s=14, color=colour, alpha=0.8, linewidths=0, label=domain, rasterized=len(points) > 1000)
    figure.legend(loc="outside lower center", ncols=len(colours), markerscale=2)
    if topics is not None:
        _write_topics(axis, points, domains, np.asarray(topics))
    return figure


def _write_topics(axis: Axes, points: np.ndarray, domains: np.ndarray, topics: np.ndarray) -> None:
    box = {"boxstyle": "round,pad=0.2", "facecolor": matplotlib.rcParams["patch.edgecolor"], "alpha": 0.75, "lw": 0}
    found = []
    for domain in dict.fromkeys(domains):
        names, counts = np.unique(topics[domains == domain], return_counts=True)
        found += [(count, domain, name) for count, name in sorted(zip(counts, names, strict=True))[-LABELS:]]
    taken = []
    axis.figure.draw_without_rendering()
    for _, domain, topic in sorted(found, reverse=True):
        place = np.median(points[(domains == domain) & (topics == topic)], axis=0)
        text = axis.annotate(topic, place, ha="center", va="center", fontsize=10, bbox=box)
        extent = text.get_window_extent().expanded(1.1, 1.6)
        if any(extent.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(extent)


def tsne(texts: Sequence[str], *, seed: int = 0) -> np.ndarray:
    """Places texts so that those with the same words lie together: TF-IDF, 50 components, then t-SNE.

    Args:
        texts: At least five.
        seed: Same seed, same places.

    Returns:
        Places. Shape (texts, 2).

    Raises:
        ValueError: If there are too few texts.
    """
    # heavy, and only needed here
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.manifold import TSNE

    if len(texts) < 5:
        raise ValueError(f"A map needs neighbours, so at least 5 texts, but got {len(texts)}. Pass more texts.")
    words = TfidfVectorizer(sublinear_tf=True, max_features=20_000).fit_transform(texts)
    components = min(50, min(words.shape) - 1)
    # with two words or less there is nothing to reduce
    words = TruncatedSVD(components, random_state=seed).fit_transform(words) if components > 1 else words.toarray()
    perplexity = min(30.0, (len(texts) - 1) / 3)
    return TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(words)
