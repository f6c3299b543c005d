"""What the site needs beyond Markdown: equations as MathML, and pictures that follow its light and dark palette."""

import html
import re

from latex2mathml.converter import convert


EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img alt="([^"]+)" src="([^"]+)"[^>]*>\s*</picture>'
)


def on_page_markdown(markdown: str, **_) -> str:
    """`<picture>` asks the system which palette it likes; the reader may have chosen the other one on the page."""
    return PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)


def on_page_content(content: str, **_) -> str:
    """Equations become MathML, which browsers draw by themselves: no script, no font, no network."""
    return EQUATION.sub(_mathml, content)


def _mathml(found: re.Match) -> str:
    tag, latex = found[1], html.unescape(found[2])
    return f'<{tag} class="equation">{convert(latex, display="block" if tag == "div" else "inline")}</{tag}>'
