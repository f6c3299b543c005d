"""Words of others, such as models, cards and names, on their way to a terminal or a page: as text, and nothing else."""

import re
from html import escape

import typer
from rich.console import Console as RichConsole
from rich.segment import Segment


# C0 but for tab and line feed, DEL and C1; what turns the direction of text; tags that nobody sees; half pairs
_UNSEEN = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_UNSEEN += [0x061C, *range(0xD800, 0xE000), *range(0xE0000, 0xE0080)]
# C0 has pictures of its own
_SHOWN = {code: chr(0x2400 + code) if code < 32 else "\ufffd" for code in _UNSEEN} | {127: "\u2421"}


def plain(text: object) -> str:
    """Text without what a terminal would obey: each control character as a sign that is seen, each line end as it is."""
    return str(text).replace("\r\n", "\n").translate(_SHOWN)


def markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line: no HTML, no links, no table cells."""
    line = " ".join(plain(text).split())
    return re.sub(r"([\\\[\]|])", r"\\\1", escape(line, quote=False))


def echo(message: object = "", err: bool = False) -> None:
    """Prints a message that may hold words of others."""
    typer.echo(plain(message), err=err)


class Console(RichConsole):
    """A console that colours what it is told to and obeys nothing in the text."""

    def __init__(self, **settings) -> None:
        super().__init__(**{"highlight": False, "markup": False, **settings})

    def render(self, renderable, options=None):
        """As rich does, with the text made plain."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)
