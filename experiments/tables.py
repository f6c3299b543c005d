"""Writes the documents' tables from the files under results/.

    python -m experiments.tables

A table stands between `<!-- results/<path>: <name> -->` and `<!-- end -->`; `TABLES` has the function of each name,
from the path to Markdown. A path is a file, an experiment's folder, or a pattern for the files of several seeds
(`results/rivals/from_scratch-*.json`), whose means are shown.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from experiments import ledger


ROOT = ledger.ROOT
DOCUMENTS = (
    "README.md",
    "MODEL_CARD.md",
    "EXPERIMENTS.md",
    "docs/families.md",
    "docs/security.md",
    "docs/when-not.md",
)
MARKED = re.compile(r"(<!-- (results/\S+): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
DOMAINS = ("text", "code", "math")

# Ding et al., 2024, table 2: TruthfulQA, HumanEval and GSM8K, in per cent
PAPER_STAGES = {
    "joint from the start": (51.17, 46.95, 53.83),
    "two stages": (61.72, 50.00, 52.69),
    "two stages, balanced": (64.67, 53.05, 54.59),
}
# table 3 (ACL 2025 version): loss on AlpacaEval, HumanEval and GSM8K, in a unit that it does not name
PAPER_LOSSES = {
    "text specialist": (0.046, 0.055, 0.063),
    "code specialist": (0.060, 0.042, 0.056),
    "math specialist": (0.062, 0.064, 0.036),
}
# table 6: mean weight of the specialists for text, code and mathematics, by domain
PAPER_WEIGHTS = {"text": (0.45, 0.29, 0.26), "code": (0.23, 0.59, 0.18), "math": (0.18, 0.39, 0.43)}
# table 1: average of seven benchmarks in per cent, recomputed from the seven; tuned on what the fused model is tuned on
PAPER_TUNED = {
    "text specialist": (35.46,),
    "text specialist, tuned further": (41.60,),
    "code specialist": (36.78,),
    "code specialist, tuned further": (21.76,),
    "math specialist": (29.90,),
    "math specialist, tuned further": (36.94,),
    "fused": (46.05,),
}


def with_tables(text: str) -> str:
    """The same document with every marked table written anew.

    Raises:
        ValueError: If a marker names a table or a file that is not there.
    """
    return MARKED.sub(lambda m: f"{m[1]}\n{table(ROOT / m[2], m[3])}\n\n{m[4]}", text)


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
    """What `ultrafuser evaluate` found, best mean first: losses and how sure they are, then what each keeps and costs.

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
    """What is ahead of the fused model, and the rivals that one would name first, beside the oracle specialist.

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
    """What gates got under each setting on text that was kept out: nats to the oracle, and on mixed items."""
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


def stages_beside_paper(path: Path) -> str:
    """The paper's table 2 beside ours: what each step of the training adds."""
    found = ledger.results(path.name)
    ours = {name: averaged(vector(r["nats_per_token"]) for r in results) for name, results in found.items()}
    return beside(["TruthfulQA, %", "HumanEval, %", "GSM8K, %"], PAPER_STAGES, 2, DOMAINS, ours, 3)


def losses_beside_paper(path: Path) -> str:
    """The paper's table 3 beside ours: loss of every specialist on every domain."""
    return beside(["AlpacaEval", "HumanEval", "GSM8K"], PAPER_LOSSES, 3, DOMAINS, losses_of(path), 3)


def weights_beside_paper(path: Path) -> str:
    """The paper's table 6 beside ours: mean gate weights by domain."""
    heads = [[f"{d}, {whose}" for d in DOMAINS] for whose in ("paper", "ours")]
    return beside(heads[0], PAPER_WEIGHTS, 2, heads[1], weights_of(path), 2, corner="mean gate weight on")


def tuned_beside_paper(path: Path) -> str:
    """The paper's figure 5 (of its first version) beside ours: every specialist tuned on all the data."""
    ours = {name: [mean(by_domain)] for name, by_domain in losses_of(path).items()}
    return beside(["seven benchmarks, %"], PAPER_TUNED, 2, ["mean of domains, nats"], ours, 3)


def cleaning(path: Path) -> str:
    """What the data filters find of what was planted, and what cleaning takes by the number of records."""
    found = files(path)[0]
    plants = [[name, *map(str, (p["planted"], p["found"]))] for name, p in found["recall"]["plants"].items()]
    wrong = ["dropped among the others", str(found["recall"]["others"]), str(found["recall"]["false_positives"])]
    columns = "records_per_second", "processor_milliseconds_per_record", "peak_mib", "load_average"
    rows = [[f"{row['records']:,}", *(f"{row[c]:,}" for c in columns)] for row in found["rows"]]
    heads = ["records", "per second", "processor ms each", "peak MiB", "load"]
    return "\n\n".join([markdown(["", "records", "found"], [*plants, wrong]), markdown(heads, rows)])


def families_fused(path: Path) -> str:
    """How every use of every family that can be fused ends, with itself and with Llama."""
    found = {f: its for f, its in files(path)[0]["families"].items() if isinstance(its.get("itself"), dict)}
    uses = list(next(iter(found.values()))["itself"])
    rows = []
    for family, its in found.items():
        pairs = [its[pair] for pair in ("itself", "Llama") if isinstance(its[pair], dict)]
        cells = [[_ENDINGS[pair[use].partition(":")[0]] for pair in pairs] for use in uses]
        rows.append([f"`{family}`", *(" / ".join(dict.fromkeys(both)) for both in cells)])
    return markdown(["family", *uses], rows)


_ENDINGS = {"right": "✓", "as alone": "as alone", "refused": "refused", "wrong": "wrong"}


def families_refused(path: Path) -> str:
    """The sentence that refuses a family."""
    found = files(path)[0]["families"].items()
    told = {f: its["itself"] for f, its in found if isinstance(its.get("itself"), str)}
    return markdown(["family", "what is said"], [[f"`{f}`", _cell(said)] for f, said in told.items()])


def families_not_built(path: Path) -> str:
    """Why a family was not tried."""
    found = files(path)[0]["families"].items()
    told = {f: its["not tiny"] for f, its in found if "not tiny" in its}
    return markdown(["family", "why"], [[f"`{f}`", _cell(said)] for f, said in told.items()])


def _cell(text: str) -> str:
    return f"`` {text.removeprefix('refused: ').replace('|', '¦')} ``"


def verbatim(path: Path) -> str:
    """What a command printed."""
    return f"```\n{path.read_text().rstrip()}\n```"


def servers(path: Path) -> str:
    """What became of clients and strangers at once, from `python -m tests.load`."""
    found = files(path)[0]
    rows = []
    for command in ("serve", "demo"):
        one = found[command]
        memory = f"{one['memory before, MB']} to {one['memory after, MB']} MB"
        rows.append([f"`{command}`", str(one["asked"]), str(one["answered as alone"]), memory])
    threads = found["threads"]
    right = threads["asked"] - threads["answered otherwise"]
    rows.append([f"{threads['threads']} threads, {threads['ways']} ways", str(threads["asked"]), str(right), ""])
    strangers = [[kind, str(count)] for kind, count in sorted(found["serve"]["strangers"].items())]
    return "\n\n".join(
        [
            markdown(["", "asked", "answered as alone", "memory before and after"], rows),
            markdown(["strangers beside `serve`'s clients", "times"], strangers),
        ]
    )


def damaged(path: Path) -> str:
    """What became of files that were damaged at random, by kind."""
    counts = json.loads(path.read_text())["counts"]
    heads = ["", "mutations", *next(iter(counts.values()))]
    return markdown(heads, [[k, f"{sum(c.values()):,}", *(f"{n:,}" for n in c.values())] for k, c in counts.items()])


def durability(path: Path) -> str:
    """Stops and full disks that each command came through, from `python -m tests.durability`."""
    rows = []
    for command, one in files(path)[0]["commands"].items():
        disks = one["disks"]
        stops = (
            f"{one['survived']} of {one['kills']}",
            *(f"{one[kind]['survived']} of {one[kind]['sent']}" for kind in ("SIGTERM", "SIGINT")),
        )
        twice = "one ran, one was told" if one["twice"]["held"] else "no"
        told = f"{disks['in_a_sentence'] + disks['read_only_told']} of {disks['full'] + 1}"
        rows.append([f"`{command}`", *stops, twice, told, f"{disks['same_with_room']} of {len(disks['sizes'])}"])
    heads = "kills survived", "SIGTERM", "Ctrl-C", "twice at once", "full or read-only disks told in a sentence"
    return markdown(["", *heads, "the same with room again"], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "losses": losses,
    "damaged": damaged,
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
    "stages beside the paper's": stages_beside_paper,
    "losses beside the paper's": losses_beside_paper,
    "gate weights beside the paper's": weights_beside_paper,
    "tuned further beside the paper's": tuned_beside_paper,
    "cleaning": cleaning,
    "families that are fused": families_fused,
    "families that are refused": families_refused,
    "families that were not built": families_not_built,
    "verbatim": verbatim,
    "servers": servers,
    "durability": durability,
}


def losses_of(path: Path) -> dict[str, list[float]]:
    """By row the loss on each domain: of the quickstart's file, or of files that `ultrafuser evaluate` writes."""
    return pooled([f.get("nats_per_token") or {row["name"]: row["loss"] for row in f["rows"]} for f in files(path)])


def weights_of(path: Path) -> dict[str, list[float]]:
    """By domain the mean weight of each specialist, from the same files."""
    found = [f.get("mean_gate_weights") or f["gate"]["mean_weights"] for f in files(path)]
    return {domain: weights for domain, weights in pooled(found).items() if domain in DOMAINS}


def files(path: Path) -> list[dict]:
    """What all result files of a path say, seed by seed."""
    return [json.loads(file.read_text()) for file in sorted(path.parent.glob(path.name))]


def pooled(found: list[dict]) -> dict[str, list[float]]:
    """Means over files of what each has by name."""
    return {name: averaged(vector(f[name]) for f in found) for name in found[0]}


def vector(values: Mapping[str, float] | list[float]) -> list[float]:
    """Values by domain or specialist in the one order."""
    return [values[d] for d in DOMAINS] if isinstance(values, Mapping) else values


def averaged(vectors: Iterable[list[float]]) -> list[float]:
    """Element by element."""
    return [mean(values) for values in zip(*vectors, strict=True)]


def beside(heads, paper, places, our_heads, ours, our_places, corner="") -> str:
    """The paper's rows, each with ours of the same name."""
    rows = [[name, *numbers(p, places), *numbers(ours[name], our_places)] for name, p in paper.items()]
    return markdown([corner, *heads, *our_heads], rows)


def numbers(values: Iterable[float], places: int = 3) -> list[str]:
    return [f"{value:.{places}f}" for value in values]


def spread(values: Sequence[float]) -> str:
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{more}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
