"""Tables of what fused specialists cost, and of the ways to pay less, from results of benchmarks and experiments."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from experiments import ledger
from experiments.averages import DOMAINS, files, numbers, spread
from ultrafuser.reports.marked_tables import markdown


PRUNED = {
    "six": "all six",
    "by name": "the three that were made for the domains, fused",
    "picked": "`pick`, then fused",
    "pruned": "`prune`",
    "pruned, trained again": "`prune`, and the gate trained again",
}
SHOWN = (4, 8)  # tokens between decisions of dropping
ROUTED = {"fused": "the gate, no router", "oracle": "the right specialist (oracle)"}
WAYS = ("one specialist", "fused", "fused, stacked", "fused, stacked, compiled", "fused, self-drafting")


def ways(path: Path) -> str:
    """Tables the time of a token and the weights of each way against one specialist, in both shapes of `benchmarks.rivals`."""
    found = files(path)[0]
    small, large = found["small"], found["large"]
    rows = []
    for way in WAYS:
        times = [_times(shape[way]["token"]) if way in shape else "" for shape in (small, large)]
        rows.append([way, *times, f"{(large if way in large else small)[way]['weights']:.2f}"])
    return markdown(["", "a token, bound by operations", "a token, bound by weights", "weights"], rows)


def adapters(path: Path) -> str:
    """Tables what adapters of one base cost against one specialist: `benchmarks.adapters`."""
    found = files(path)[0]["ways"]
    one = next(iter(found.values()))["bytes of weights"]
    rows = [
        [way, _times(row["step"]), _times(row["prompt"]), f"{row['bytes of weights'] / one:.2f}"]
        for way, row in found.items()
    ]
    return markdown(["", "a token", "a prompt", "weights"], rows)


def _times(row: dict) -> str:
    return "{median:.2f} ({least:.2f} to {most:.2f})".format(**row)


def pruning(path: Path) -> str:
    """Tables the loss of six specialists, and of three that were kept or picked: mean ± standard deviation over seeds."""
    rows = []
    for results in ledger.results(path.name).values():
        for model in results[0]["nats_per_token"]:
            losses = [[one["nats_per_token"][model][d] for d in DOMAINS] for one in results]
            by_domain = [mean(own) for own in zip(*losses, strict=True)]
            rows.append([PRUNED[model], *numbers(by_domain), spread([mean(own) for own in losses])])
    return markdown(["", *DOMAINS, "mean"], sorted(rows, key=lambda row: row[-1]))


def routers(path: Path) -> str:
    """Tables the loss of a fused model with and without routers: mean ± standard deviation over seeds, the best first."""
    rows = []
    for results in ledger.results(path.name).values():
        for name in results[0]["nats_per_token"]:
            own = [one["nats_per_token"][name] for one in results]
            kind, _, how = name.partition(", ")
            shares = [f"{mean(one['right'][kind][d] for one in results):.0%}" if how else "" for d in DOMAINS]
            means = [mean(losses[d] for d in DOMAINS) for losses in own]
            mixed = [losses["mixed"] for losses in own]
            rows.append([ROUTED.get(name, f"`{kind}`, {how}"), spread(means), spread(mixed), *shares])
    chosen = [f"{d} to its specialist" for d in DOMAINS]
    return markdown(["", "mean of domains", "mixed items", *chosen], sorted(rows, key=lambda row: row[1]))


def compression(path: Path) -> str:
    """Tables the gain of tuning that compressed specialists keep, and their weights against three full models fused."""
    rows = []
    for name, result in files(path)[0].items():
        millions = result["parameters"] / 1e6
        for row in result["rows"]:
            kept = [row["kept"][d] for d in DOMAINS]
            shares = [f"{share:.1%}" for share in (*kept, mean(kept))]
            what = f"{name}, {millions:.1f}M each, rank {row['rank']}, of the {row['shared']}"
            rows.append([what, *shares, f"{row['memory against three fused']:.2f}"])
    return markdown(["", *DOMAINS, "mean", "weights"], rows)


def dropping(path: Path) -> str:
    """Tables reads and losses of dropping with each gate, on answers of one domain and of two, and the time of a token."""
    plain, rows, times = [], [], []
    for gate, found in files(path)[0]["gates"].items():
        plain.append([gate, *(f"{found['losses']['plain'][d]:.3f}" for d in (*DOMAINS, "both"))])
        for row in found["losses"]["rows"]:
            if row["every"] in SHOWN:
                above = [f"{row['above plain'][d]:+.3f}" for d in DOMAINS]
                one = [
                    f"{mean(row['reads'][d] for d in DOMAINS):.2f}",
                    *above,
                    f"{mean(row['above plain'][d] for d in DOMAINS):+.3f}",
                ]
                both = [f"{row['reads']['both']:.2f}", f"{row['above plain']['both']:+.3f}"]
                rows.append([gate, str(row["every"]), f"`{row['keep']}`", *one, *both])
        seconds = found.get("seconds", {})
        for way in (w for w in seconds.get("both", ()) if w != "plain"):
            ratios = (_times(seconds[d][way]["seconds"]) for d in (*DOMAINS, "both"))
            passes = found["generated reads"][way]
            reads = (f"{mean(passes[d] for d in DOMAINS):.2f}", f"{passes['both']:.2f}")
            times.append([gate, way, *ratios, *reads])
    heads = ["gate", "every", "keep", "reads", *DOMAINS, "mean", "reads, two domains", "nats, two domains"]
    tables = [
        markdown(["nats per token, the plain way", *DOMAINS, "two domains"], plain),
        markdown(heads, rows),
        markdown(["gate", "time of a token", *DOMAINS, "two domains", "reads", "reads, two domains"], times),
    ]
    return "\n\n".join(tables)


def merging(path: Path) -> str:
    """Tables held-out losses of merges and exported mixtures, mean over seeds, best mean first."""
    seeds = [one["losses"] for one in files(path)[0]["rows"]]
    rows = []
    for name in seeds[0]:
        losses = [[one[name][d] for d in DOMAINS] for one in seeds]
        by_domain = [mean(own) for own in zip(*losses, strict=True)]
        rows.append([name, *numbers(by_domain), spread([mean(own) for own in losses])])
    return markdown(["", *DOMAINS, "mean"], sorted(rows, key=lambda row: float(row[-1].split()[0])))


TABLES: dict[str, Callable[[Path], str]] = {
    "ways": ways,
    "adapters": adapters,
    "pruning": pruning,
    "routers": routers,
    "compression": compression,
    "dropping": dropping,
    "merging": merging,
}
