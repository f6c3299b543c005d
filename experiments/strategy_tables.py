"""Tables of strategies beside the plain gate."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from experiments.averages import DOMAINS, files, numbers, spread
from ultrafuser.reports.marked_tables import markdown


MIXED = "mixed"


def strategies(path: Path) -> str:
    """Held-out nats per token of each row, and what else is measured of it; means over seeds, the best mean first."""
    found = [f["nats_per_token"] for f in files(path)]
    more = [key for key in next(iter(found[0].values())) if key not in (*DOMAINS, MIXED)]
    rows = []
    for name in found[0]:
        seeds = [f[name] for f in found]
        means = [mean(one[d] for d in DOMAINS) for one in seeds]
        cells = numbers(mean(one[d] for one in seeds) for d in (*DOMAINS, MIXED))
        rows.append(
            (mean(means), [name, *cells, spread(means), *numbers((mean(o[k] for o in seeds) for k in more), 2)])
        )
    return markdown(["", *DOMAINS, MIXED, "mean", *more], [row for _, row in sorted(rows, key=lambda row: row[0])])


def gates(path: Path) -> str:
    """The same of fused models after stage one, from files of `ultrafuser evaluate`."""
    by_name: dict[str, list[dict]] = {}
    for file in files(path):
        for row in file["rows"]:
            if row["kind"] == "fused" and "stage two" not in row["name"] or row["name"].startswith("uniform"):
                by_name.setdefault(row["name"], []).append(row)
    rows = []
    for name, seeds in sorted(by_name.items(), key=lambda item: mean(row["mean"] for row in item[1])):
        cells = numbers(mean(row["loss"][d] for row in seeds) for d in (*DOMAINS, MIXED))
        rows.append([name, *cells, spread([row["mean"] for row in seeds])])
    return markdown(["", *DOMAINS, MIXED, "mean"], rows)


TABLES: dict[str, Callable[[Path], str]] = {"strategies": strategies, "gates": gates}
