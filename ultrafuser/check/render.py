"""A judgement for people and for programs."""

from collections.abc import Iterator

import psutil
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from modeling_ultrafuser.plan_base_ultrafuser import BLOCKS, FITS, WARNING

from ..merge import MERGES
from ..plain import plain
from .checks import Judgement


STYLES = {FITS: "green", WARNING: "yellow", BLOCKS: "bold red"}
VERDICTS = {
    FITS: "These models can be fused.",
    WARNING: "These models can be fused; read the warnings.",
    BLOCKS: "These models cannot be fused.",
}


def show(judgement: Judgement, console: Console) -> None:
    """Prints what was found, what fusing would take, and the verdict; in plain lines where nobody watches."""
    # where nobody watches a line stays one line, so that other programs can read it
    piped = not console.is_terminal
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    # the worst first
    for finding in sorted(judgement.findings, key=lambda f: list(STYLES).index(f.status), reverse=True):
        words = (finding.status, *(plain(w) if w else w for w in (finding.about, finding.text, finding.fix)))
        if piped:
            console.print(Text("  ".join(filter(None, words))), soft_wrap=True)
        else:
            table.add_row(Text(finding.status, STYLES[finding.status]), *map(Text, words[1:]))
    if not piped:
        console.print(table, "")
    for what, number in _numbers(judgement):
        console.print(Text(plain(f"{what:26} {number}")), soft_wrap=piped)
    console.print(Text(VERDICTS[judgement.verdict], STYLES[judgement.verdict]))


def _numbers(judgement: Judgement) -> Iterator[tuple[str, str]]:
    n = judgement.numbers
    if n is None:
        return
    yield "parameters", ", ".join(f"{name} {_count(count)}" for name, count in n["parameters"].items())
    yield "still to download", decimal(n["download"])
    yield f"disk, memory ({n['dtype']})", decimal(n["disk"])
    if n["untying"]:
        tied = ", ".join(f"{name} {decimal(size)}" for name, size in n["untying"].items())
        yield "of it for heads untied", tied
    yield "memory free here", decimal(psutil.virtual_memory().available)
    yield "memory by dtype", ", ".join(f"{dtype} {decimal(size)}" for dtype, size in n["memory"].items())
    cache = n["cache_per_token"]
    yield "cache of a token", decimal(cache) if cache else "not known for these layers"
    cost, rows = n["cost_per_token"], n["cost_per_token"].get("rows")
    read = f" in weights to read, {rows} times in products" if rows else ""
    yield "cost of a token", f"{cost['times']} times that of {cost['of']}{read}"
    for stage, size in n["training"].items():
        yield f"training, {stage}", f"{decimal(size)} and activations"
    if judgement.merges:
        based = ", ".join(name for name in judgement.merges if MERGES[name].needs_base)
        yield "merges possible, too", ", ".join(judgement.merges) + f" ({based} with their common base)"
    else:
        yield "merges possible, too", f"none: {judgement.no_merge}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e8 else f"{parameters / 1e6:.3g} M"


def as_dict(judgement: Judgement) -> dict:
    """The same for programs."""
    sources = judgement.sources.items()
    return {
        "verdict": judgement.verdict,
        "specialists": {n: {"source": s.location, "commit": s.commit, "gated": s.gated} for n, s in sources},
        "findings": [{key: getattr(f, key) for key in ("about", "status", "text", "fix")} for f in judgement.findings],
        "merges": {"possible": judgement.merges, "why_none": judgement.no_merge},
        "numbers": judgement.numbers,
    }
