"""Runs of experiments, each in a process of its own."""

import importlib
import inspect
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from experiments import ledger


def check(run: ledger.Run) -> None:
    """Checks that the run's function takes its settings.

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
    function = importlib.import_module(f"experiments.{run.runner}").RUNS[run.experiment]
    work.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    measured = function(run.seed, work, **run.settings)
    measured = {"seconds": time.process_time() - began} | measured
    ledger.record(run, measured)
    return measured["seconds"]
