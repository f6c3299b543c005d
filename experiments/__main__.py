"""Runs what is missing of the experiments: what has no result yet, or whose config has changed since.

    python -m experiments                 # all of them
    python -m experiments stages mixes    # some
    python -m experiments --list          # say what is missing, run nothing

An experiment is a folder with a config, `experiments/<name>/config.yaml`: what is varied, under which settings and
seeds. A result is one file, `results/<name>/<variant>-<seed>.json`: what was measured, with versions, commit, machine
and a hash of the settings. How an experiment runs is code: its config names a `runner`, a module of this package with

    RUNS: dict[str, function]      # by experiment: f(seed, work, **settings) -> what was measured, fit for JSON
    CHECKS: dict[str, function]    # may be left out: f(**settings) raises ValueError or TypeError before anything runs

Settings are the config's `shared` ones and the variant's own; the function's signature says which there are. Seconds
are those of processor time that the function took, unless it returns `seconds` of the part that matters. Whatever runs
can share (specialists, a first stage) they keep in the folder `work`. `python -m experiments.tables` writes the results
into the documents.
"""

import argparse
import importlib
import inspect
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from experiments import ledger


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ledger.experiments()
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}; default: all")
    parser.add_argument("--list", action="store_true", help="say what is missing and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ultrafuser-experiments")
    options = parser.parse_args()
    if unknown := sorted(set(options.experiments) - set(names)):
        parser.error(f"There is no experiment {unknown[0]!r}, only {', '.join(names)}.")
    try:
        runs = [run for name in options.experiments or names for run in ledger.read(name)]
        todo = [run for run in runs if ledger.result(run) is None]
        if not options.list:
            for run in todo:
                check(run)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(f"{run}: {'config changed' if run.path().exists() else 'not run'}" for run in todo))
        print(f"{len(todo)} of {len(runs)} runs are missing")
    else:
        run_all(todo, options.work, options.jobs)


def check(run: ledger.Run) -> None:
    """Whether the run's function takes its settings.

    Raises:
        ValueError: If there is no such function or it does not take them.
    """
    module = importlib.import_module(f"experiments.{run.runner}")
    if run.experiment not in module.RUNS:
        raise ValueError(f"{run.experiment}: experiments/{run.runner}.py runs {sorted(module.RUNS)} only.")
    try:
        inspect.signature(module.RUNS[run.experiment]).bind(run.seed, Path(), **run.settings)
        getattr(module, "CHECKS", {}).get(run.experiment, dict)(**run.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run}: {error}") from error


def run_all(todo: list[ledger.Run], work: Path, jobs: int) -> None:
    """Runs in processes of their own. The first failure ends it; results that are written stay."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        waiting = {pool.submit(run_one, run, work): run for run in todo}
        for i, future in enumerate(as_completed(waiting), 1):
            try:
                print(f"{i}/{len(todo)} {waiting[future]}: {future.result():.0f} s", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def run_one(run: ledger.Run, work: Path) -> float:
    """Runs and records. Returns the seconds."""
    import torch

    torch.set_num_threads(1)
    function: Callable = importlib.import_module(f"experiments.{run.runner}").RUNS[run.experiment]
    work.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    measured = function(run.seed, work, **run.settings)
    measured = {"seconds": time.process_time() - began} | measured
    ledger.record(run, measured)
    return measured["seconds"]


if __name__ == "__main__":
    main()
