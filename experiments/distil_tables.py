"""Tables of the experiment on distillation."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from experiments import ledger
from experiments.averages import DOMAINS, files, spread
from ultrafuser.reports.marked_tables import markdown


MIXED = "mixed"
FIRST = "the fused model"
TUNED = ("base, tuned on the same data", *(f"{d} specialist, tuned further" for d in DOMAINS))


def distilled(path: Path) -> str:
    """Tables students by their teacher, and single models tuned on the same text, best mean first.

    Nats per token are means over seeds; shares are of the gap between the base and the fused model, seed by seed.
    """
    found = ledger.results(path.name)
    first = found[FIRST]
    ends = [(r["before"], r["teacher"]) for r in first]
    losses = {f"taught by {name}": [r["nats_per_token"] for r in seeds] for name, seeds in found.items()}
    losses |= {name: _tuned(path, name) for name in TUNED}
    losses |= {"base": [start for start, _ in ends], "fused": [end for _, end in ends]}
    rows = []
    for name, seeds in sorted(losses.items(), key=lambda item: mean(map(_mean, item[1]))):
        each = [*DOMAINS, MIXED]
        cells = [f"{mean(one[d] for one in seeds):.3f}" for d in each]
        pure = [_closed(_mean(a), _mean(x), _mean(b)) for (a, b), x in zip(ends, seeds, strict=True)]
        mixed = [_closed(a[MIXED], x[MIXED], b[MIXED]) for (a, b), x in zip(ends, seeds, strict=True)]
        shares = [f"{mean(s):.0%} ({min(s):.0%} to {max(s):.0%})" for s in (pure, mixed)]
        rows.append([name, *cells, spread(list(map(_mean, seeds))), *shares])
    return markdown(["", *DOMAINS, MIXED, "mean of domains", "gap closed", "gap closed, mixed"], rows)


def _tuned(path: Path, name: str) -> list[dict[str, float]]:
    """Losses of a row of `experiments/baselines`, which tunes it on as many tokens of the same text."""
    every = files(path.parent / "baselines" / "from_one_base-*.json")
    return [row["loss"] for one in every for row in one["rows"] if row["name"] == name]


def _mean(losses: Mapping[str, float]) -> float:
    return mean(losses[d] for d in DOMAINS)


def _closed(start: float, now: float, end: float) -> float:
    return (start - now) / (start - end)


TABLES = {"distilled": distilled}
