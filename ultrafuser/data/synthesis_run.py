"""Following a recipe to the end: the journal, the teacher, a bar, and the made set on disk."""

import hashlib
import itertools
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ..atomic import sole_writer, whole_file, write_whole
from ..journal import ReplyJournal
from .recipe import Recipe
from .sources import line_of, read_lines
from .synthesis import RECORDS, Maker, all_instructions, conversations
from .teacher import Request, Teacher, cost


JOURNAL = "journal.jsonl"


def make_set(recipe: Recipe, out: Path, calls: int | None = None, console: Console | None = None) -> dict:
    """Makes the data of a recipe, going on from whatever the folder's journal holds.

    Writes to `out`: `journal.jsonl`, all replies; `steps/`, what each step came to; one JSON lines file per domain and
    `dataset/`, all records for `datasets.load_from_disk`; and `report.json`. What is answered when the teacher stops is
    written too; if nothing is yet, the records of an earlier run stay.

    Args:
        recipe: What to make.
        out: Folder, made if it is not there.
        calls: How many there will be, for the bar.
        console: Where the bar goes. One that is no terminal gets none.

    Returns:
        What the report says: counts, what it cost, what was given up, and `stopped`, why it ended early, or None.

    Raises:
        ValueError: If the key is missing or the journal cannot be used.
    """
    console = console or Console(stderr=True)
    columns = "{task.description:12}", BarColumn(), MofNCompleteColumn(), "{task.fields[spent]}", TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=calls, spent="")

    writes = (JOURNAL, "steps", "unfinished", "dataset", "report.json", *(f"{name}.jsonl" for name in recipe.domains))
    with sole_writer(out, "data make", writes, begun=[JOURNAL]), ReplyJournal(out / JOURNAL) as journal, bar:

        def on_reply(request: Request) -> None:
            tokens = journal.tokens_in, journal.tokens_out
            spent = f"{sum(tokens):,} tokens, {cost(recipe.teacher, *tokens):,.2f} spent"
            bar.update(task, advance=1, description=request.step, spent=spent)

        with Teacher(recipe.teacher, journal, recipe.budget, on_reply) as teacher:
            maker = Maker(recipe, teacher)
            rows = all_instructions(
                maker, lambda name, rows: _write_lines(out / "steps" / f"{name}.jsonl", rows.to_list())
            )
            counts = _write_records(out, recipe, conversations(maker, rows) if rows else ())
            report = _report(maker, teacher, counts)
        if counts:
            write_whole(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    with whole_file(path) as file:
        file.writelines(map(line_of, rows))


def _write_records(out: Path, recipe: Recipe, records: Iterable[dict]) -> Counter:
    """Writes one file per domain and all as a data set. Returns how many records there are by domain and kind."""
    counts, paths = Counter(), {name: out / f"{name}.jsonl" for name in recipe.domains}
    # what an earlier run wrote stays until there is something to put in its place; what a killed one began does not
    folder = out / "unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    parts = {name: folder / path.name for name, path in paths.items()}
    with ExitStack() as stack:
        files = {name: stack.enter_context(part.open("w", encoding="utf-8")) for name, part in parts.items()}
        for record in records:
            files[record["domain"]].write(line_of(record))
            counts[record["domain"], record["kind"]] += 1
    if counts:
        _save_dataset(parts.values(), folder)
        shutil.rmtree(out / "dataset", ignore_errors=True)
        (folder / "dataset").rename(out / "dataset")
        for name, part in parts.items():
            part.replace(paths[name])
    shutil.rmtree(folder)
    return counts


def _save_dataset(paths: Iterable[Path], folder: Path) -> None:
    def records() -> Iterator[dict]:
        return itertools.chain.from_iterable(map(read_lines, paths))

    digest = hashlib.sha256()
    for record in records():
        digest.update(line_of(record).encode())
    # by default the fingerprint, which is saved too, would depend on the folder
    dataset = Dataset.from_generator(
        records, RECORDS, cache_dir=str(folder / "cache"), fingerprint=digest.hexdigest()[:16]
    )
    dataset.save_to_disk(folder / "dataset")


def _report(maker: Maker, teacher: Teacher, counts: Counter) -> dict:
    records, given_up = defaultdict(dict), defaultdict(dict)
    for (domain, kind), number in sorted(counts.items()):
        records[domain][kind] = number
    for (step, domain), number in sorted((+maker.given_up).items()):
        given_up[step][domain] = number
    tokens_in, tokens_out = teacher.spent
    return {
        "records": records,
        "given_up": given_up,
        "replies": len(teacher.journal),
        "refused": teacher.refused,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "cost": cost(teacher.settings, tokens_in, tokens_out),
        "stopped": teacher.stopped,
        "recipe": maker.recipe.model_dump(mode="json"),
    }
