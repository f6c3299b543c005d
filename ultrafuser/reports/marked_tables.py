"""Tables of documents, each between `<!-- results/PATH: NAME -->` and `<!-- end -->`, written anew from result files."""

import re
from collections.abc import Callable


MARKED = re.compile(r"(<!-- (results/\S+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, table: Callable[[str, str], str]) -> str:
    """Returns a document with every marked table replaced.

    Args:
        text: The document.
        table: From a marker's path and name to Markdown; it raises where there is no such table.
    """
    return MARKED.sub(lambda marked: f"{marked[1]}\n{table(marked[2], marked[3])}\n\n{marked[4]}", text)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table whose columns but the first hold numbers."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
