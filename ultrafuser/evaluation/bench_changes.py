"""Compares a model's benchmark results with other models': shares of their scores, and answers that flipped."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Column, Table

from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.refusals_ultrafuser import Refusal


# what must be alike for questions to be the same
ALIKE = ("limit", "chat", "shots", "seed")
Results = Mapping[str, dict[str, Any]]  # of tasks, as `run_suite` returns them


class Change(NamedTuple):
    """A task's score beside another model's.

    Attributes:
        here: Score by the task's first metric.
        there: The other model's.
        lost: Share of all questions that are right there and wrong here (MUSCLE, arXiv 2407.09435); None where answers
            are not right or wrong, or the files do not say.
        won: Share that is wrong there and right here.
    """

    here: float
    there: float
    lost: float | None
    won: float | None

    @property
    def ratio(self) -> float | None:
        """Returns the share of the other's score that this one reaches, or None if that is 0."""
        return self.here / self.there if self.there else None


def answers(task: str, evaluated: dict[str, Any]) -> list[int] | None:
    """Tells which questions of a task were answered right by its first metric, in their order.

    Args:
        task: Its name.
        evaluated: What lm-eval returns.

    Returns:
        A 1 or 0 for each; None for a group of tasks, and where answers are not right or wrong.
    """
    metric, kind = next((key.split(",", 1) for key in evaluated["results"].get(task, {}) if _is_score(key)), ("", ""))
    rows = [row for row in (evaluated.get("samples") or {}).get(task, []) if row["filter"] == kind]
    found = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
    return [int(value) for value in found] if found and all(value in (0, 1) for value in found) else None


def _is_score(key: str) -> bool:
    return "," in key and "_stderr," not in key


def read_others(folders: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Results]:
    """Reads other models' results.

    Args:
        folders: That `ultrafuser bench` wrote, by the model's name.
        files: Names of files by task.

    Raises:
        Refusal: If a folder has a result of none of the tasks.
    """
    others = {}
    for name, folder in folders.items():
        there = {task: Path(folder) / file for task, file in files.items()}
        others[name] = {task: read_json(file) for task, file in there.items() if file.exists()}
        if not others[name]:
            raise Refusal(
                f"{folder!r} has no result of {sorted(files)}",
                "Models are compared on the same tasks",
                f"Run `ultrafuser bench` on {name!r} first, with `--out {folder}`.",
            )
    return others


def changes(results: Results, other: Results) -> dict[str, Change]:
    """Compares the tasks that both have.

    Raises:
        Refusal: If a task was asked in another way.
    """
    found = {}
    for task in [task for task in results if task in other]:
        here, there = results[task], other[task]
        if odd := [k for k in ALIKE if here["settings"].get(k) != there["settings"].get(k)]:
            raise Refusal(
                f"{task!r} was run with { ({k: here['settings'].get(k) for k in odd}) } here and "
                f"{ ({k: there['settings'].get(k) for k in odd}) } there",
                "Scores of other questions do not compare",
                "Run both alike.",
            )
        lost = won = None
        ours, theirs = here.get("answers"), there.get("answers")
        if ours and theirs and len(ours) == len(theirs):
            lost = fmean(a < b for a, b in zip(ours, theirs, strict=True))
            won = fmean(a > b for a, b in zip(ours, theirs, strict=True))
        found[task] = Change(first_score(here)[1], first_score(there)[1], lost, won)
    return found


def first_score(result: dict[str, Any]) -> tuple[str, float]:
    """Returns a task's first metric, and its value."""
    scores = result["scores"].get(result["task"]) or next(iter(result["scores"].values()))
    return next((metric, score["value"]) for metric, score in scores.items())


def table(results: Results, others: Mapping[str, Results]) -> Table:
    """Shows every task's score, the share of each other model's that it is, and flips; then means, and the time taken."""
    columns = [Column("score", justify="right")]
    columns += [Column(f"{what} {name}", justify="right") for name in others for what in ("of", "lost", "won")]
    caption = (
        "of: share of the other's score; lost: share of questions that the other answers right, and this model wrong; "
        "won: the reverse"
    )
    shown = Table("", *columns, caption=caption, caption_justify="left")
    found = {name: changes(results, other) for name, other in others.items()}
    for task, result in results.items():
        cells = [f"{first_score(result)[1]:.4f}"]
        for own in found.values():
            change = own.get(task)
            cells += ["", "", ""] if change is None else map(_share, (change.ratio, change.lost, change.won))
        shown.add_row(task, *cells)
    means = [cell for own in found.values() for cell in (_share(_mean(c.ratio for c in own.values())), "", "")]
    shown.add_row("mean", f"{fmean(first_score(result)[1] for result in results.values()):.4f}", *means)
    times = [
        cell
        for other in others.values()
        for cell in (_share(_ratio(seconds(results, other), seconds(other, results))), "", "")
    ]
    shown.add_row("seconds", f"{seconds(results, results) or 0:.0f}", *times)
    return shown


def seconds(results: Results, other: Results) -> float | None:
    """Sums the time of the tasks that both have; None if a file does not say."""
    times = [results[task].get("seconds") for task in results if task in other]
    return None if None in times else sum(times)


def _ratio(here: float | None, there: float | None) -> float | None:
    return here / there if here and there else None


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
