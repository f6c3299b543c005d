"""Benchmark scores of a fused model in the Hub's forms: `model-index` of its card, and `.eval_results/*.yaml`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from ..atomic import write_whole
from ..plain import markdown


# first line of a file that this package may replace or remove
MARK = "# written by `ultrafuser card`\n"


class Benchmark(NamedTuple):
    """A benchmark that has a leaderboard on the Hub.

    Attributes:
        dataset: Id of its dataset.
        task_id: Id of the task in the `eval.yaml` of the dataset.
        metric: Name of lm-eval's metric that the leaderboard ranks by, with its filter.
    """

    dataset: str
    task_id: str
    metric: str


# by lm-eval's name of the task
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "gsm8k", "exact_match,flexible-extract"),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match,custom-extract"),
}


def check_same_model(results: dict, folder: Path) -> None:
    """Rejects benchmark results of another folder than this, if that folder is still there.

    Raises:
        ValueError: Naming both.
    """
    measured = Path(str(results["settings"].get("model")))
    if measured.is_dir() and not measured.samefile(folder):
        raise ValueError(
            f"Results must be those of this model, {str(folder)!r}, but those of {results['task']!r} are of "
            f"{str(measured)!r}. Run `ultrafuser bench` on this folder."
        )


def check_different_tasks(benchmarks: Sequence[dict]) -> None:
    """Rejects two results of one task.

    Raises:
        ValueError: Naming the task.
    """
    tasks = [results["task"] for results in benchmarks]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ValueError(f"A card has one result of a task, but got several of {twice}. Give one of each.")


def is_whole(results: dict) -> bool:
    """Returns whether all questions were asked."""
    return results["settings"].get("limit") is None


def metrics(results: dict) -> dict[str, float]:
    """Returns the scores of the task itself, by lm-eval's name of the metric. Shares from 0 to 1, for most."""
    return {metric: score["value"] for metric, score in results["scores"].get(results["task"], {}).items()}


def write_eval_results(folder: Path, benchmarks: Sequence[dict]) -> list[Path]:
    """Writes `.eval_results/<task>.yaml` for each benchmark with a leaderboard, and removes what it wrote before.

    Results of a part of the questions are left out: they are in the card alone.

    Args:
        folder: Of the fused model.
        benchmarks: Results that `ultrafuser bench` wrote, as `read_results` returns them.

    Returns:
        The files.

    Raises:
        FileExistsError: If a file of that name is someone else's.
    """
    written = []
    entries = {r["task"]: _entry(r) for r in benchmarks if r["task"] in BENCHMARKS and is_whole(r)}
    theirs = [f for f in _files(folder) if not f.read_text(encoding="utf-8").startswith(MARK)]
    if taken := [f for f in theirs if f.stem in entries]:
        raise FileExistsError(
            f"Only results that this command wrote are replaced, but {str(taken[0])!r} is another's. Move it away."
        )
    for task, entry in entries.items():
        path = folder / EVAL_RESULTS_FOLDER / f"{task}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, MARK + yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
        written.append(path)
    for old in set(_files(folder)) - {*written, *theirs}:
        old.unlink()
    return written


def _files(folder: Path) -> list[Path]:
    return sorted((folder / EVAL_RESULTS_FOLDER).glob("*.yaml"))


def _entry(results: dict) -> EvalResultEntry:
    benchmark = BENCHMARKS[results["task"]]
    found = metrics(results)
    if benchmark.metric not in found:
        raise ValueError(
            f"The leaderboard of {benchmark.dataset} ranks by {benchmark.metric!r}, but the results of {results['task']!r} "
            f"have {sorted(found)}. Run `ultrafuser bench` anew."
        )
    notes = f"{_shots(results)}, {benchmark.metric.partition(',')[2]}, lm-eval {results['versions'].get('lm_eval')}"
    # leaderboards count in percent
    value = round(100 * found[benchmark.metric], 2)
    return EvalResultEntry(benchmark.dataset, benchmark.task_id, value, notes=notes)


def _shots(results: dict) -> str:
    shots = results["settings"].get("shots")
    return "examples as lm-eval has them" if shots is None else f"{shots}-shot"


def measured(benchmarks: Sequence[dict]) -> list[EvalResult]:
    """Returns all scores in the form of `model-index`."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=BENCHMARKS[r["task"]].dataset if r["task"] in BENCHMARKS else r["task"],
            dataset_name=r["task"],
            # the Hub's form tells metrics of a dataset apart by this
            metric_type=metric.removesuffix(",none").replace(",", "_"),
            metric_value=round(value, 4),
        )
        for r in benchmarks
        for metric, value in metrics(r).items()
    ]


def rows(benchmarks: Sequence[dict]) -> list[dict[str, str]]:
    """Returns a row of the card's table for each score."""
    return [
        {
            "task": markdown(r["task"]),
            "metric": markdown(metric.removesuffix(",none")),
            "value": f"{value:.4f}",
            "asked": _shots(r) if is_whole(r) else f"{_shots(r)}, {r['settings']['limit']} questions",
        }
        for r in benchmarks
        for metric, value in metrics(r).items()
    ]
