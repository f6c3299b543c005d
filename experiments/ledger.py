"""Reads every experiment, which runs of it have been measured, and which are missing."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ultrafuser.atomic import write_json
from ultrafuser.provenance import digest, provenance


ROOT = Path(__file__).parent.parent
KEYS = {"runner", "seeds", "shared", "variants"}


class Run(NamedTuple):
    """One variant of an experiment under one seed."""

    experiment: str
    variant: str
    seed: int
    runner: str  # module of this package whose RUNS has the experiment
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.experiment}: {self.variant}, seed {self.seed}"

    def digest(self) -> str:
        """Hash of the settings: another config, another hash."""
        return digest(self.settings, 12)

    def path(self, root: Path = ROOT) -> Path:
        """The result file."""
        name = self.variant.replace(" ", "_").replace(",", "")
        return root / "results" / self.experiment / f"{name}-{self.seed}.json"


def experiments(root: Path = ROOT) -> list[str]:
    """Names of all experiments."""
    return sorted(path.parent.name for path in (root / "experiments").glob("*/config.yaml"))


def read(experiment: str, root: Path = ROOT) -> list[Run]:
    """Every run that an experiment's config asks for, all seeds of a variant together. A variant may name its own seeds.

    Raises:
        ValueError: If the config is not what a config must be.
    """
    path = root / "experiments" / experiment / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict) or set(found) | {"shared"} != KEYS:
        has = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} must have {sorted(KEYS)} ('shared' may be left out), but has {has}.")
    if not (root / "experiments" / f"{found['runner']}.py").exists():
        raise ValueError(f"{path} names runner {found['runner']!r}, but there is no experiments/{found['runner']}.py.")
    if odd := [name for name, own in found["variants"].items() if not isinstance(own or {}, dict)]:
        raise ValueError(f"{path}: a variant is settings by name, but {odd[0]!r} is {found['variants'][odd[0]]!r}.")
    variants = {name: merged(found.get("shared") or {}, own or {}) for name, own in found["variants"].items()}
    seeds = {name: own.pop("seeds", found["seeds"]) for name, own in variants.items()}
    runs = [Run(experiment, v, seed, found["runner"], s) for v, s in variants.items() for seed in seeds[v]]
    if len({run.path(root) for run in runs}) < len(runs):
        raise ValueError(f"{path} has two runs that would write the same file. Give every variant a name of its own.")
    return runs


def merged(shared: dict, own: dict) -> dict:
    """Settings of a variant: its own before the shared ones, in nested settings too."""
    nested = [key for key in shared if isinstance(shared[key], dict) and isinstance(own.get(key), dict)]
    return shared | own | {key: merged(shared[key], own[key]) for key in nested}


def result(run: Run, root: Path = ROOT) -> dict | None:
    """Returns the result of exactly these settings, or None."""
    path = run.path(root)
    found = json.loads(path.read_text()) if path.exists() else None
    return found if found and found.get("config") == run.digest() else None


def results(experiment: str, root: Path = ROOT) -> dict[str, list[dict]]:
    """All results by variant, one for each seed, in the config's order.

    Raises:
        ValueError: If one is missing.
    """
    found: dict[str, list[dict]] = {}
    for run in read(experiment, root):
        one = result(run, root)
        if one is None:
            raise ValueError(f"{run}, has no result. `python -m experiments {experiment}` makes it.")
        found.setdefault(run.variant, []).append(one)
    return found


def record(run: Run, measured: dict, root: Path = ROOT) -> Path:
    """Writes a result with where it comes from. A killed process leaves the whole file or none."""
    path = run.path(root)
    write_json(path, {"name": run.variant, "seed": run.seed, "config": run.digest(), **provenance(), **measured})
    return path
