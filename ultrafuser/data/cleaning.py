"""Cleaning a set of records in one pass: every filter counts, and shows what it dropped and why.

Records stream through: filters that look at one record run in as many processes as are asked for, duplicates are
looked up in an index on disk, in the order of the records. Results do not depend on the number of processes.
"""

import collections
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..atomic import sole_writer, write_whole
from ..plain import plain
from . import filters
from .arithmetic import wrong_arithmetic
from .decontamination import contaminated
from .duplicates import DUPLICATES, DuplicateIndex, Fingerprint, fingerprint
from .sources import line_of, lines_file


KEPT, DROPPED, REPORT = "kept.jsonl", "dropped.jsonl", "cleaning.json"
# in this order; the first that objects drops a record, so each is counted once
FILTERS: dict[str, Callable[[dict], str | None]] = {
    "length": filters.wrong_length,
    "language": filters.wrong_language,
    "refusal": filters.refusal,
    "code": filters.broken_code,
    "arithmetic": wrong_arithmetic,
    "contamination": contaminated,
}
CHUNK = 64


def clean(
    records: Iterable[dict],
    out: Path,
    *,
    languages: tuple[str, ...] = ("en",),
    shortest: int = 20,
    longest: int = 40_000,
    near: float = 0.7,
    evaluation: dict[str, np.ndarray] | None = None,
    skip: Iterable[str] = (),
    processes: int = 1,
    overwrite: bool = False,
    then: Iterable[Callable[[Path], dict]] = (),
) -> dict:
    """Writes `kept.jsonl`, `dropped.jsonl` and `cleaning.json` to a folder.

    A line of `dropped.jsonl` holds the record, its row in the input, counted from 1, the filter, and why: the line
    that does not parse, the equality that does not hold, the 13-gram, the row of the record that it repeats.

    Args:
        records: The records, streamed, as `sources.take_in` gives them.
        out: Folder to write to; made if it is not there.
        languages: ISO 639-1 codes of the languages that are kept.
        shortest: Fewest characters of a record.
        longest: Most characters of a record.
        near: Jaccard similarity of shingles from which on a record repeats another.
        evaluation: Name of every evaluation set to its `decontamination.gram_hashes`.
        skip: Filters to leave out, of `FILTERS` and `DUPLICATES`.
        processes: For the filters of single records. With more than one, a script calls this under
            `if __name__ == "__main__":`, since processes begin by importing it.
        overwrite: Replace a cleaned set, once the new one is whole.
        then: Filters that rank what is kept, as those of `ranking`, with the folder as their argument. Each returns the
            report.

    Returns:
        What is in `cleaning.json`: numbers of records, kept and dropped, altogether, by filter and by domain.

    Raises:
        ValueError: If a filter to skip is unknown.
        ImportError: If languages cannot be told.
        FileExistsError: If the folder holds a cleaned set.
    """
    if unknown := set(skip) - {*FILTERS, *DUPLICATES}:
        raise ValueError(f"Filters are {[*FILTERS, *DUPLICATES]}, but to skip are {sorted(unknown)}.")
    if "language" not in set(skip):
        filters.need_language_model()
    settings = {
        "length": {"shortest": shortest, "longest": longest},
        "language": {"languages": tuple(languages)},
        "contamination": {"evaluation": evaluation or {}},
    }
    checks = {n: functools.partial(f, **settings.get(n, {})) for n, f in FILTERS.items() if n not in set(skip)}
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with _in_place(out, overwrite) as folder:
        with (
            DuplicateIndex(folder / "index.sqlite", near) as index,
            lines_file(folder / KEPT) as kept,
            lines_file(folder / DROPPED) as dropped,
            closing(_judged(records, checks, near, processes)) as judged,
        ):
            for row, (record, verdict) in enumerate(tqdm(judged, unit=" records", disable=None), start=1):
                if isinstance(verdict, Fingerprint):
                    verdict = index.repeats(row, verdict, set(skip))
                counts[record["domain"]][verdict[0] if verdict else "kept"] += 1
                if verdict:
                    write_dropped(dropped, row, *verdict, record)
                else:
                    kept.write(line_of(record))
        filters_used = [*checks, *(name for name in DUPLICATES if name not in set(skip))]
        report = write_report(folder, {"filters": filters_used, "domains": counts})
        for rank in then:
            report = rank(folder)
    return report


@contextmanager
def _in_place(out: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a folder to write a cleaned set into, whose files are put into `out` once it is whole, the kept last."""
    with sole_writer(out, "data clean", (KEPT, DROPPED, REPORT), overwrite=overwrite):
        if (out / KEPT).exists() and not overwrite:
            raise FileExistsError(
                f"Nothing is overwritten unasked, but {str(out)!r} holds a cleaned set. Write elsewhere, or use "
                f"overwrite."
            )
        folder = out / ".cleaning"
        # of a run that was killed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            for name in (DROPPED, REPORT, KEPT):
                (folder / name).replace(out / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_dropped(file, row: int, reason: str, why: str, record: dict) -> None:
    """One line of `dropped.jsonl`."""
    file.write(line_of({"row": row, "filter": reason, "why": why, "record": record}))


def write_report(out: Path, report: dict) -> dict:
    """Writes `cleaning.json` with all sums taken anew, and returns it."""
    total: collections.Counter = sum(map(collections.Counter, report["domains"].values()), collections.Counter())
    report = {
        "records": total.total(),
        "kept": total["kept"],
        "dropped": {name: total[name] for name in report["filters"]},
        **report,
    }
    write_whole(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def table(report: dict) -> str:
    """The report as lines of text: one for each filter, one column for each domain."""
    domains = report["domains"]
    rows = [("", *map(plain, domains), "all")]
    for name in (*report["filters"], "kept"):
        counts = [own.get(name, 0) for own in domains.values()]
        rows.append((name, *map(str, counts), str(report["dropped"].get(name, report["kept"]))))
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in rows)


def _judged(records, checks: dict, near: float, processes: int) -> Iterator[tuple[dict, tuple | Fingerprint]]:
    """Every record, in order, with the filter and the reason that drop it, or with its fingerprint."""
    # as many as are worth a message between processes
    stream = iter(records)
    chunks = iter(lambda: list(itertools.islice(stream, CHUNK)), [])
    if processes == 1:
        for chunk in chunks:
            yield from zip(chunk, _judge(chunk, checks, near), strict=True)
        return
    # spawned, not forked: a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque = collections.deque()
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(checks, near)) as pool:
        try:
            for chunk in chunks:
                with _out_of_reach():
                    waiting.append((chunk, pool.submit(_judge_in_process, chunk)))
                # so many are under way at once, and no more are read
                if len(waiting) > 2 * processes:
                    chunk, verdicts = waiting.popleft()
                    yield from zip(chunk, verdicts.result(), strict=True)
            for chunk, verdicts in waiting:
                yield from zip(chunk, verdicts.result(), strict=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _out_of_reach() -> Iterator[None]:
    """Keeps Ctrl-C, which a terminal sends to all processes, from those that are started here: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _judge(chunk: list[dict], checks: dict, near: float) -> list[tuple[str, str] | Fingerprint]:
    return [_first_objection(record, checks) or fingerprint(record, near) for record in chunk]


def _first_objection(record: dict, checks: dict) -> tuple[str, str] | None:
    return next(((name, why) for name, check in checks.items() if (why := check(record))), None)


_OWN: dict = {}


def _begin(checks: dict, near: float) -> None:
    """In a process of its own, which ends with the one that started it, however that ended."""
    _OWN.update(checks=checks, near=near)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _judge_in_process(chunk: list[dict]) -> list[tuple[str, str] | Fingerprint]:
    return _judge(chunk, **_OWN)
