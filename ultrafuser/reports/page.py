"""One web page about a fused model: no file beside it, no request to anywhere, everything escaped."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from .colours import css
from .explanation import FUSED, Token, leaders, mean_weights


TEMPLATE = Path(__file__).with_name("page.html")
NONE = "–"


def render(
    title: str,
    *,
    facts: Mapping[str, str],
    rows: Sequence[Mapping] = (),
    left_out: Mapping[str, str] | None = None,
    figures: Sequence[Mapping[str, str]] = (),
    texts: Mapping[str, list[Token]] | None = None,
    colours: Mapping[str, str],
) -> str:
    """The page as HTML.

    Args:
        title: Its heading.
        facts: What the numbers were made with.
        rows: Rows of a comparison, as `ultrafuser evaluate` writes them.
        left_out: What could not be compared, and why.
        figures: With `title`, `caption` and `svg`, the last as `plots.save` returns it.
        texts: Explained texts by title.
        colours: Colour of each specialist.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = sorted(rows, key=lambda row: row["mean"])
    domains = list(dict.fromkeys(domain for row in rows for domain in row["loss"]))
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        facts=facts,
        domains=domains,
        losses=[_losses(row, domains) for row in rows],
        costs=[_costs(row) for row in rows],
        left_out=left_out or {},
        figures=[{**figure, "svg": _labelled(figure)} for figure in figures],
        texts=[_text(name, tokens, colours) for name, tokens in (texts or {}).items()],
        colours=colours,
    )


def verdict(row: Mapping) -> str:
    """Classifies a row: ahead of the fused model or behind it, or too close to tell by its interval."""
    if row["name"] == FUSED:
        return "this model"
    low, high = row.get("difference_interval") or (None, None)
    if low is None:
        return NONE
    return "ahead" if high < 0 else "behind" if low > 0 else "too close to tell"


def _losses(row: Mapping, domains: list[str]) -> dict:
    fused = row["name"] == FUSED
    return {
        "name": row["name"],
        "kind": row["kind"],
        "verdict": verdict(row),
        "by_domain": [_cell(row["loss"].get(d), (row.get("loss_interval") or {}).get(d)) for d in domains],
        "mean": _cell(row["mean"], row.get("mean_interval")),
        "difference": (NONE, "") if fused else _cell(row.get("difference"), row.get("difference_interval"), "+.3f"),
        "p": NONE if fused or row.get("p") is None else f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001",
    }


def _costs(row: Mapping) -> dict:
    cost = row.get("cost") or {}
    averaged = [row.get(key) or {} for key in ("accuracy", "calibration_error")]
    shares = [*(row.get(key) for key in ("positive_flips", "negative_flips", "retention"))]
    sizes = [cost.get(key) for key in ("parameters", "parameters_per_token", "bytes", "cache_bytes_per_token")]
    speed = cost.get("tokens_per_second")
    cells = [f"{sum(v.values()) / len(v):.3f}" if v else NONE for v in averaged]
    cells += [NONE if share is None else f"{share:.1%}" for share in shares]
    cells += [NONE if size is None else _short(size) for size in sizes]
    return {"name": row["name"], "cells": [*cells, NONE if speed is None else f"{speed:.0f}"]}


def _cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> tuple[str, str]:
    """A number and its interval."""
    if value is None:
        return NONE, ""
    return format(value, form), f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


def _short(number: float) -> str:
    """With three digits and a metric prefix: 2.54 M."""
    for prefix in ("", " k", " M", " G"):
        if number < 999.5 or prefix == " G":
            return f"{number:.3g}{prefix}"
        number /= 1000


def _labelled(figure: Mapping[str, str]) -> Markup:
    """The figure's SVG, which is our own, with a name for readers who do not see it."""
    return Markup(figure["svg"].replace("<svg ", f'<svg role="img" aria-label="{escape(figure["title"])}" ', 1))


def _text(title: str, tokens: list[Token], colours: Mapping[str, str]) -> dict:
    spans = [
        {"html": _visible(token.text), "style": _style(token, leader, colours)}
        for token, leader in zip(tokens, leaders(tokens), strict=True)
    ]
    return {
        "title": title,
        "continued": any(token.generated for token in tokens),
        "mean_weights": mean_weights(tokens),
        "tokens": spans,
        "data": {"names": [FUSED, *tokens[-1].weights], "tokens": [_numbers(token) for token in tokens]},
    }


def _numbers(token: Token) -> dict:
    """Returns the details of a token that the page shows on demand. More digits would only make the file larger."""
    return {
        "text": token.text,
        "weights": {name: round(weight, 6) for name, weight in token.weights.items()},
        "probabilities": {name: round(own, 6) for name, own in token.probabilities.items()},
        "candidates": {
            name: [(c.text, round(c.probability, 6)) for c in own] for name, own in token.candidates.items()
        },
    }


def _visible(text: str) -> Markup:
    """The text, with a sign where there would be nothing to point at."""
    return escape(text).replace("\n", Markup("<i>⏎</i>\n")) or Markup("<i>◌</i>")


def _style(token: Token, leader: str | None, colours: Mapping[str, str]) -> str:
    return "" if leader is None else css(colours[leader], token.weights[leader], len(token.weights))
