"""Who speaks, in a terminal."""

from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..plain import Console, plain
from .colours import assign, blend, strength, text_on
from .explanation import FUSED, Token, are_signed, leaders, mean_spreads, mean_weights


def print_tokens(tokens: list[Token], console: Console | None = None) -> None:
    """Prints a text coloured by who speaks; where there are no colours, a table of its tokens."""
    console = console or Console()
    if console.color_system is None:
        # wide enough for any line, so that other programs can read it
        console.width = 10_000
        console.print(token_table(tokens))
        return
    names = list(tokens[-1].weights)
    colours = assign(names)
    console.print(_coloured(tokens, colours))
    legend = Text("\n")
    means = mean_weights(tokens)
    for name, weight in means.items():
        legend.append(f" {name} ", speaker_style(colours[name], 1.0, len(names)))
        legend.append(f" {weight:.0%}   ")
    console.print(legend)
    signed = "Weights are signed: they are no shares. " if are_signed(means) else ""
    told = f"Mean gate weights. {signed}A stronger colour is a larger weight of the specialist that leads."
    console.print(told, style="dim")
    spreads = mean_spreads(tokens)
    own = ", ".join(f"{name} {spreads[name]:.1f}" for name in names)
    told = f"Spread of logits: {own}. Where logits are added, one of a larger spread counts for more."
    console.print(Text(told, style="dim"))


def token_table(tokens: list[Token]) -> Table:
    """One line per token: gate weights, probability of the token under every model, the likeliest tokens."""
    names = list(tokens[-1].weights)
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("token", *(f"w({name})" for name in names), *(f"p({name})" for name in (FUSED, *names))):
        table.add_column(column, justify="left" if column == "token" else "right", no_wrap=True)
    table.add_column("likeliest (fused)", no_wrap=True)
    for token in tokens:
        likeliest = "  ".join(f"{plain(c.text)!r} {c.probability:.2f}" for c in token.candidates.get(FUSED, ()))
        weights = [f"{w:.3f}" for w in token.weights.values()] or [""] * len(names)
        probabilities = [f"{token.probabilities[n]:.3f}" if token.probabilities else "" for n in (FUSED, *names)]
        table.add_row(*map(Text, (repr(plain(token.text)), *weights, *probabilities, likeliest)))
    return table


def _coloured(tokens: list[Token], colours: dict[str, str]) -> Text:
    text = Text()
    for token, leader in zip(tokens, leaders(tokens), strict=True):
        if leader is None:
            text.append(plain(token.text), "dim")
        else:
            style = speaker_style(colours[leader], token.weights[leader], len(colours))
            *lines, rest = plain(token.text).split("\n")
            for line in lines:
                # the line's end itself stays without a style, or colour would fill the rest of the line
                text.append(line + "⏎", style).append("\n")
            text.append(rest, style)
    return text


def speaker_style(colour: str, weight: float, specialists: int) -> Style:
    """Returns the terminal style of a specialist that leads with this weight."""
    # both colours are given, so that it reads whatever the terminal's own are
    background = blend(colour, 1.5 * strength(weight, specialists))
    return Style(color=text_on(background), bgcolor=background)
