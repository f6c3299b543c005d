"""Averages result files of several seeds: means, in one order of domains."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean


DOMAINS = ("text", "code", "math")


def losses_of(path: Path) -> dict[str, list[float]]:
    """By row the loss on each domain: of the quickstart's file, or of files that `ultrafuser evaluate` writes."""
    return pooled([f.get("nats_per_token") or {row["name"]: row["loss"] for row in f["rows"]} for f in files(path)])


def weights_of(path: Path) -> dict[str, list[float]]:
    """By domain the mean weight of each specialist, from the same files."""
    found = [f.get("mean_gate_weights") or f["gate"]["mean_weights"] for f in files(path)]
    return {domain: weights for domain, weights in pooled(found).items() if domain in DOMAINS}


def files(path: Path) -> list[dict]:
    """Returns the values of all result files of a path, seed by seed."""
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


def numbers(values: Iterable[float], places: int = 3) -> list[str]:
    return [f"{value:.{places}f}" for value in values]


def spread(values: Sequence[float]) -> str:
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{more}"
