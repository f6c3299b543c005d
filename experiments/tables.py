"""Writes the documents' tables from the files under results/.

    python -m experiments.tables

A table stands between `<!-- results/<path>: <name> -->` and `<!-- end -->`; `TABLES` has the function of each name,
from the path to Markdown. A path is a file, an experiment's folder, or a pattern for the files of several seeds
(`results/rivals/from_scratch-*.json`), whose means are shown.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean

from experiments import (
    cost_tables,
    distil_tables,
    ledger,
    paper_tables,
    real_tables,
    robustness_tables,
    strategy_tables,
)
from experiments.averages import DOMAINS, files, losses_of, numbers, spread, vector, weights_of
from ultrafuser.reports import marked_tables
from ultrafuser.reports.marked_tables import markdown


ROOT = ledger.ROOT
DOCUMENTS = (
    "README.md",
    "MODEL_CARD.md",
    "EXPERIMENTS.md",
    "docs/costs.md",
    "docs/families.md",
    "docs/fuse.md",
    "docs/merge.md",
    "docs/security.md",
    "docs/serve.md",
    "docs/strategies.md",
    "docs/when-not.md",
)


def with_tables(text: str) -> str:
    """The same document with every marked table written anew.

    Raises:
        ValueError: If a marker names a table or a file that is not there.
    """
    return marked_tables.with_tables(text, lambda path, name: table(ROOT / path, name))


def table(path: Path, name: str) -> str:
    """One table as Markdown."""
    if name not in TABLES:
        raise ValueError(f"There is no table {name!r}, only {', '.join(TABLES)}.")
    if not list(path.parent.glob(path.name)):
        raise ValueError(
            f"A document's table is of {path}, which is not there. `python -m experiments` makes results."
        )
    return TABLES[name](path)


def losses(path: Path) -> str:
    """Held-out loss by row and domain, then mean gate weights."""
    rows = [[name, *numbers(by_domain), *numbers([mean(by_domain)])] for name, by_domain in losses_of(path).items()]
    shares = [[domain, *numbers(by_specialist, 2)] for domain, by_specialist in weights_of(path).items()]
    return "\n\n".join([markdown(["", *DOMAINS, "mean"], rows), markdown(["mean gate weight on", *DOMAINS], shares)])


def runs(path: Path, **columns: Callable[[list[dict], list[dict]], str]) -> str:
    """Held-out nats per token of an experiment's variants, mean ± standard deviation over seeds.

    Args:
        path: The experiment's folder of results.
        columns: Further ones by head: from a variant's results and the first variant's to a cell.
    """
    found = ledger.results(path.name)
    first = next(iter(found.values()))
    rows = []
    for variant, results in found.items():
        values = [[*vector(r["nats_per_token"]), mean(vector(r["nats_per_token"]))] for r in results]
        more = [cell(results, first) for cell in columns.values()]
        rows.append([variant, *map(spread, zip(*values, strict=True)), *more])
    return markdown(["", *DOMAINS, "mean", *columns], rows)


def relative_time(results: list[dict], first: list[dict]) -> str:
    """Processor time against the first variant's."""
    mine, its = (mean(r["seconds"] for r in group) for group in (results, first))
    return f"{mine / its:.2f}"


def worst_gain(results: list[dict], first: list[dict]) -> str:
    """Change of loss in the domain that gained least, or lost most, from the stage before."""
    return spread([max(r["nats_per_token"][d] - r["before"][d] for d in DOMAINS) for r in results])


def comparison(path: Path) -> str:
    """Tables the results of `ultrafuser evaluate`, best mean first: losses with intervals, then retention and costs.

    Nats per token are means over seeds, ± their standard deviation; the intervals are of the examples and hold for every
    seed: from the lowest end to the highest.
    """
    by_name: dict[str, list[dict]] = {}
    for found in files(path):
        for row in found["rows"]:
            by_name.setdefault(row["name"], []).append(row)
    quality, price = [], []
    for name, seeds in sorted(by_name.items(), key=lambda item: mean(row["mean"] for row in item[1])):
        losses = numbers(mean(row["loss"][d] for row in seeds) for d in (*DOMAINS, "mixed"))
        low = min(row["difference_interval"][0] for row in seeds)
        high = max(row["difference_interval"][1] for row in seeds)
        sure = f"{low:+.3f} to {high:+.3f}" if name != "fused" else ""
        quality.append([name, *losses, *(spread([row[key] for row in seeds]) for key in ("mean", "difference")), sure])
        shares = [
            f"{mean(row[key] for row in seeds):.1%}" for key in ("retention", "positive_flips", "negative_flips")
        ]
        error = mean(mean(row["calibration_error"][d] for d in DOMAINS) for row in seeds)
        costs = [f"{seeds[0]['cost'][key] / 1e6:.2f}" for key in ("parameters", "parameters_per_token", "bytes")]
        cache = f"{seeds[0]['cost']['cache_bytes_per_token'] / 1024:.1f}"
        speeds = [f"{statistics.median(row['cost']['speed'] for row in seeds):.2f}"]
        price.append([name, *shares, f"{error:.3f}", *costs, cache, *speeds])
    losses_heads = ["", *DOMAINS, "mixed", "mean", "to the fused model", "95 % of every seed"]
    price_heads = ["", "retains", "gains", "loses", "calibration error"]
    price_heads += ["parameters, M", "per token, M", "memory, MB", "cache, KiB per token", "speed"]
    return "\n\n".join([markdown(losses_heads, quality), markdown(price_heads, price)])


def headline(path: Path) -> str:
    """Tables the rows ahead of the fused model, and the usual rivals, beside the oracle specialist.

    A cell is a domain of one seed; ahead is what has the lower loss there.
    """
    named = (FUSED, ORACLE, "router: prompt perplexity", "uniform logits")
    by_name: dict[str, list[dict]] = {}
    for found in files(path):
        for row in found["rows"]:
            by_name.setdefault(row["name"], []).append(row)
    means = {name: mean(row["mean"] for row in seeds) for name, seeds in by_name.items()}
    rows = []
    for name in sorted(means, key=means.get):
        if means[name] > means[FUSED] and name not in named:
            continue
        pairs = zip(by_name[name], by_name[ORACLE], strict=True)
        each = [row["loss"][d] - its["loss"][d] for row, its in pairs for d in DOMAINS]
        ahead = f"{sum(x < 0 for x in each)} of {len(each)}" if name != ORACLE else ""
        mixed = mean(row["loss"]["mixed"] for row in by_name[name])
        reads = (
            by_name[name][0]["cost"]["parameters_per_token"]
            / by_name["text specialist"][0]["cost"]["parameters_per_token"]
        )
        rows.append([name, f"{means[name]:.3f}", f"{mean(each):+.3f}", ahead, f"{mixed:.3f}", f"{reads:.1f}"])
    heads = ["mean of domains", "to the oracle", "cells ahead of it", "mixed items", "specialists read per token"]
    return markdown(["", *heads], rows)


FUSED = "fused"
ORACLE = "best specialist per domain (oracle)"


def cells(path: Path) -> str:
    """Nats to the oracle by domain, seed after seed, and on mixed items; below 0 is ahead."""
    rows = []
    for name, seeds in differences(path, ORACLE).items():
        values = [[one["difference"][d] for one in seeds] for d in DOMAINS]
        by_domain = [" ".join(f"{x:+.3f}" for x in own) for own in values]
        rows.append([name, *by_domain, f"{mean(one['difference']['mixed'] for one in seeds):+.3f}"])
    return markdown(["", *DOMAINS, "mixed"], rows)


def ahead(path: Path) -> str:
    """Cells (a domain of one seed) that are ahead of each reference, the worst of them, and the mean in nats.

    The interval is of the mean over domains and of the examples, and holds for every seed: from the lowest end to the
    highest.
    """
    references = {"oracle": ORACLE, "oracle, a temperature per token": f"{ORACLE}, a temperature per token"}
    references["router"] = "router: prompt perplexity"
    found = {reference: differences(path, reference) for reference in references.values()}
    rows = []
    for name in found[ORACLE]:
        rows.append([name])
        for by_name in found.values():
            seeds = by_name.get(name, [])
            each = [one["difference"][d] for one in seeds for d in DOMAINS]
            ends = [end for one in seeds for end in one["interval"]]
            rows[-1].append(
                f"{sum(x < 0 for x in each)} of {len(each)}, {max(each):+.3f}, {mean(each):+.3f} "
                f"[{min(ends):+.3f}, {max(ends):+.3f}]"
                if seeds
                else ""
            )
    return markdown(["cells ahead, worst, mean", *references], rows)


def differences(path: Path, reference: str) -> dict[str, list[dict]]:
    """Differences to a reference of all other rows, seed after seed, the best mean first."""
    by_name: dict[str, list[dict]] = {}
    for found in files(path):
        for name, one in found["against"][reference].items():
            if name != reference:
                by_name.setdefault(name, []).append(one)
    return dict(sorted(by_name.items(), key=lambda item: mean(o["difference"][d] for o in item[1] for d in DOMAINS)))


def chosen(path: Path) -> str:
    """Tables the gates' losses on held-out text for each setting: nats to the oracle, and on mixed items."""
    rows, heads = [], []
    for variant, (one, *_) in ledger.results(path.name).items():
        cells, heads = [], []
        for setting, losses in one["nats_per_token"].items():
            behind = [losses[d] - one["oracle"][setting][d] for d in DOMAINS]
            cells += [f"{mean(behind):+.3f}", f"{max(behind):+.3f}", f"{losses['mixed']:.3f}"]
            heads += [f"{setting}, mean", "worst", "mixed"]
        rows.append([variant, *cells])
    return markdown(["", *heads], rows)


def edits(path: Path) -> str:
    """Nats per token of fused models that a specialist was added to or removed from, mean over seeds."""
    rows = []
    for variant, ran in ledger.results(path.name).items():
        for model in ran[0]["nats_per_token"]:
            losses = [one["nats_per_token"][model] for one in ran]
            cells = [f"{mean(one[d] for one in losses):.3f}" if d in losses[0] else "" for d in DOMAINS]
            rows.append([variant, model, *cells])
    return markdown(["gate", "model", *DOMAINS], rows)


def benchmarks(path: Path) -> str:
    """Scores of each model through lm-eval, the fused model's first."""
    models = {found["model"]: found for found in files(path)}
    return scores({name: models[name] for name in sorted(models, key=lambda name: (name != "fused", name))})


def scores(models: Mapping[str, dict]) -> str:
    """A row for each model, a column for each task: per cent ± standard error, both ways of asking where they differ."""
    tasks = [task.removeprefix("ultrafuser_").replace("_", " ") for task in next(iter(models.values()))["scores"]]
    rows = []
    for name, found in models.items():
        cells = [
            [f"{100 * m['value']:.1f} ± {100 * m['stderr']:.1f}" for way in task.values() for m in way.values()]
            for task in found["scores"].values()
        ]
        rows.append([name, *(" / ".join(dict.fromkeys(both)) for both in cells)])
    return markdown(["", *tasks], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "losses": losses,
    "damaged": robustness_tables.damaged,
    "runs": runs,
    "runs and time": partial(runs, time=relative_time),
    "runs, worst domain and time": partial(runs, **{"worst to stage one": worst_gain, "time": relative_time}),
    "comparison": comparison,
    "headline": headline,
    "cells": cells,
    "ahead": ahead,
    "chosen": chosen,
    "edits": edits,
    "benchmarks": benchmarks,
    "stages beside the paper's": paper_tables.stages_beside_paper,
    "losses beside the paper's": paper_tables.losses_beside_paper,
    "gate weights beside the paper's": paper_tables.weights_beside_paper,
    "tuned further beside the paper's": paper_tables.tuned_beside_paper,
    "cleaning": robustness_tables.cleaning,
    "families that are fused": robustness_tables.families_fused,
    "families that are refused": robustness_tables.families_refused,
    "families that were not built": robustness_tables.families_not_built,
    "verbatim": robustness_tables.verbatim,
    "servers": robustness_tables.servers,
    "durability": robustness_tables.durability,
    **cost_tables.TABLES,
    **real_tables.TABLES,
    **distil_tables.TABLES,
    **strategy_tables.TABLES,
}


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
