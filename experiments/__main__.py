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
import tempfile
from pathlib import Path

from experiments import ledger
from experiments.run_processes import check, run_all


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
        for run in todo:
            print(f"{run}: {'its config changed' if run.path().exists() else 'not run'}")
        print(f"{len(todo)} of {len(runs)} runs are missing")
    else:
        run_all(todo, options.work, options.jobs)


if __name__ == "__main__":
    main()
