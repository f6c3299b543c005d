"""Writes the tables of the documents from the files under results/: `python -m ultrafuser.card`."""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
DOCUMENTS = ("MODEL_CARD.md", "EXPERIMENTS.md")
MARKED = re.compile(r"(<!-- (results/\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def loss_table(results: dict) -> str:
    """Held-out loss by row and domain, then mean gate weights, as Markdown."""
    losses = results["nats_per_token"]
    domains = list(next(iter(losses.values())))
    lines = [f"| | {' | '.join(domains)} | mean |", "|---|" + "---:|" * (len(domains) + 1)]
    for name, row in losses.items():
        values = [*(row[d] for d in domains), sum(row.values()) / len(row)]
        lines.append(f"| {name} | {' | '.join(f'{v:.3f}' for v in values)} |")
    lines += ["", f"| mean gate weight on | {' | '.join(domains)} |", "|---|" + "---:|" * len(domains)]
    for domain, weights in results["mean_gate_weights"].items():
        lines.append(f"| {domain} | {' | '.join(f'{w:.2f}' for w in weights)} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """The same document with the table of every marked result file written anew."""
    return MARKED.sub(lambda m: f"{m[1]}\n{table(ROOT / m[2])}\n{m[3]}", text)


def table(path: Path) -> str:
    """The table of a result file: made here from JSON, or as the experiment wrote it."""
    return path.read_text() if path.suffix == ".md" else loss_table(json.loads(path.read_text()))


if __name__ == "__main__":
    for name in DOCUMENTS:
        (ROOT / name).write_text(with_tables((ROOT / name).read_text()))
