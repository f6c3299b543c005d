"""Adds to Markdown what the site needs: equations as MathML, pictures that follow its palette, and tables of settings."""

import html
import importlib
import inspect
import re
from dataclasses import fields

from latex2mathml.converter import convert


EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img alt="([^"]+)" src="([^"]+)"(?: (width="\d+"))?>\s*</picture>'
)
SETTINGS = re.compile(r"<!-- settings: (\w+) -->")
STRATEGIES = re.compile(r"<!-- strategies: ([\w.]+)\.(\w+)(?:; ([\w, -]+))? -->")
# further columns of a table of strategies: what a class tells of itself
COLUMNS = {
    "reads": lambda cls: ", ".join(flag.name.lower() for flag in cls.reads) or "nothing",
    "width": lambda cls: "yes" if cls.has_width else "",
    "can calibrate": lambda cls: "yes" if cls.can_calibrate else "",
    "can be signed": lambda cls: "yes" if cls.can_be_signed else "",
    "one wide head": lambda cls: "yes" if cls.one_head else "",
    "has a loss": lambda cls: "yes" if cls.has_loss else "",
    "is trained": lambda cls: "yes" if cls.trains else "",
    "needs a base": lambda cls: "yes" if cls.needs_base else "",
    "needs rows": lambda cls: "yes" if cls.reads_inputs else "",
    "needs passes": lambda cls: "yes" if cls.reads_pool else "",
    "needs own specialists": lambda cls: "yes" if cls.needs_specialists else "",
    "learns how domains act on each other": lambda cls: "yes" if cls.reads_losses else "",
}


def on_page_markdown(markdown: str, **_) -> str:
    """Pictures and settings as Markdown that every other part of the site understands."""
    # `<picture>` asks the system which palette it likes; the reader may have chosen the other one on the page
    markdown = PICTURE.sub(_both, markdown)
    markdown = STRATEGIES.sub(lambda match: _strategies(match[1], match[2], match[3]), markdown)
    return SETTINGS.sub(lambda found: _table(found[1]), markdown)


def on_page_content(content: str, **_) -> str:
    """Equations become MathML, which browsers draw by themselves: no script, no font, no network."""
    return EQUATION.sub(_mathml, content)


def _both(found: re.Match) -> str:
    dark, words, light, width = found.groups()
    size = f"{{ {width} }}" if width else ""
    return f"![{words}]({light}#only-light){size}\n![{words}]({dark}#only-dark){size}"


def _mathml(found: re.Match) -> str:
    tag, latex = found[1], html.unescape(found[2])
    return f'<{tag} class="equation">{convert(latex, display="block" if tag == "div" else "inline")}</{tag}>'


def _table(name: str) -> str:
    """The fields that a configuration adds to its parent's, with the help that the command line shows."""
    # takes seconds, and one page alone needs it
    from trainers import distil_config, stage_config

    config = getattr(distil_config if name == "DistilConfig" else stage_config, name)
    own = [f for f in fields(config) if f.name in config.__annotations__ and f.init]
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata.get('help', '')} |" for f in own]
    return "\n".join(["| setting | default | what |", "|---|---|---|", *rows])


def _strategies(module: str, name: str, columns: str | None = None) -> str:
    """The names in a dict of classes, each with the first sentence of its class, and columns of `COLUMNS`."""
    heads = columns.split(", ") if columns else []
    rows = [["name", "what", *heads], ["---"] * (2 + len(heads))]
    for key, cls in getattr(importlib.import_module(module), name).items():
        sentence = re.split(r"(?<=[\w)])\. (?=[A-Z])", _first_paragraph(cls))[0].rstrip(".")
        rows.append([f"`{key}`", sentence, *(COLUMNS[head](cls) for head in heads)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _first_paragraph(cls: type) -> str:
    return " ".join(inspect.getdoc(cls).split("\n\n")[0].split())
