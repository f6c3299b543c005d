"""Tables of strategies beside the plain gate."""

from collections.abc import Callable
from pathlib import Path
from statistics import correlation, mean

from experiments.averages import DOMAINS, files, numbers, spread
from ultrafuser.reports.marked_tables import markdown


MIXED = "mixed"
FOUND = "found"
# heads of columns
TOLD = {"trained": "trained on it", "merge": "merge of the domains' models", "alone": "mean of their losses"}


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


def mixes(path: Path) -> str:
    """Nats per token of models trained on mixes, and what was told before: by merges, and by the mean of losses."""
    found = [file["mixes"] for file in files(path)]
    rows = []
    for name in found[0]:
        own = [one[name] for one in found]
        means = {kind: [mean(one[kind].values()) for one in own] for kind in TOLD}
        shares = [f"{mean(one['shares'][d] for one in own):.2f}" for d in DOMAINS]
        rows.append((mean(means["trained"]), [name, *shares, *map(spread, means.values())]))
    return markdown(["", *DOMAINS, *TOLD.values()], [row for _, row in sorted(rows, key=lambda row: row[0])])


def ranks(path: Path) -> str:
    """Rank correlation over mixes of what was told with what training gives, on the mean of domains and on each."""
    found = [file["mixes"] for file in files(path)]
    rows = []
    for kind in ("merge", "alone"):
        by_seed = {d: [agreement(one, kind, d) for one in found] for d in (None, *DOMAINS)}
        rows.append([TOLD[kind], *map(_range, by_seed.values())])
    return markdown(["told by", "mean of domains", *DOMAINS], rows)


def _range(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def agreement(mixes: dict[str, dict], kind: str, domain: str | None = None) -> float:
    """Returns Spearman's rank correlation of what was told with what training gave, the mix that was found left out.

    Args:
        mixes: Of one seed.
        kind: Who told, a key of `TOLD`.
        domain: Whose loss; the mean over domains if none is given.
    """
    given = [mix for name, mix in mixes.items() if name != FOUND]
    losses = [
        [mean(mix[k].values()) if domain is None else mix[k][domain] for mix in given] for k in (kind, "trained")
    ]
    return correlation(*([sorted(own).index(loss) for loss in own] for own in losses))


TABLES: dict[str, Callable[[Path], str]] = {"strategies": strategies, "gates": gates, "mixes": mixes, "ranks": ranks}
