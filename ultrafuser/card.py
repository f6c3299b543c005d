"""Writes the tables of MODEL_CARD.md from the files under results/: `python -m ultrafuser.card`."""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- (results/\S+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


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
    return MARKED.sub(lambda m: m[1] + "\n" + loss_table(json.loads((ROOT / m[2]).read_text())) + "\n" + m[3], text)


if __name__ == "__main__":
    card = ROOT / "MODEL_CARD.md"
    card.write_text(with_tables(card.read_text()))
