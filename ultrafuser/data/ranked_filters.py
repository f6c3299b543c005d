"""Filters that rank: of a cleaned set, keep the part whose style is most alike, or that is most worth learning.

Both compare records of one domain with each other, so they come last, and hold eight bytes for each record.
"""

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .cleaning import DROPPED, KEPT, REPORT, write_dropped, write_report
from .filters import FENCE, answers
from .sources import line_of, lines_file, read_lines


FUNCTION_WORDS = re.compile(
    r"\b(?:the|a|an|and|or|but|if|then|so|because|however|therefore|thus|also|first|second|next|finally|of|to|in|on|"
    r"for|with|by|from|as|at|that|this|which|it|is|are|be|can|will|you|we|i)\b",
    re.I,
)
SHARE = "A share is the part of the records to keep, above 0 and up to 1"


def style(record: dict) -> np.ndarray:
    """Measures the style of the answers: lengths, vocabulary, layout and tone. Shape (10,)."""
    text = "\n".join(answers(record))
    prose = FENCE.sub("\n", text)
    lines = [line for line in prose.splitlines() if line.strip()]
    words = re.findall(r"[^\W\d_]+", prose)
    sentences = len(re.findall(r"[.!?](?:\s|$)", prose)) + 1
    first = [word.lower() for word in words[:100]]
    parts = {
        "characters": np.log1p(len(text)),
        "words per sentence": np.log1p(len(words) / sentences),
        "letters per word": sum(map(len, words)) / max(1, len(words)),
        "different words": len(set(first)) / max(1, len(first)),
        "function words": len(FUNCTION_WORDS.findall(prose)) / max(1, len(words)),
        "punctuation": len(re.findall(r"[,;:()]", prose)) / max(1, len(words)),
        "list items": sum(bool(re.match(r"\s*(?:[-*+•]|\d+[.)])\s", line)) for line in lines) / max(1, len(lines)),
        "headings": sum(line.startswith("#") for line in lines) / max(1, len(lines)),
        "code": 1 - len(prose) / max(1, len(text)),
        "tone": len(re.findall(r"[!?]", prose)) / sentences,
    }
    return np.array([*parts.values()], float)


def style_distances(path: Path) -> np.ndarray:
    """Measures each record's distance from its domain's usual style: the mean squared z-score. Shape (records,).

    A measure of the consistency that SCAR ranks by (Li et al., 2025, https://arxiv.org/abs/2406.10882), without its
    trained ranker: means and variances of a domain are taken in a first pass over the file, distances in a second.
    """
    sums: dict[str, list] = defaultdict(lambda: [0, 0.0, 0.0])
    for record in read_lines(path):
        number, mean, squares = sums[record["domain"]]
        found = style(record)
        # Welford's recurrence, which loses nothing to cancellation
        change = found - mean
        mean = mean + change / (number + 1)
        sums[record["domain"]] = [number + 1, mean, squares + change * (found - mean)]
    scale = {d: (mean, np.sqrt(squares / number)) for d, (number, mean, squares) in sums.items()}

    def distance(record: dict) -> float:
        mean, deviation = scale[record["domain"]]
        varies = deviation > 1e-9
        return float((((style(record) - mean)[varies] / deviation[varies]) ** 2).mean()) if varies.any() else 0.0

    return np.fromiter(map(distance, read_lines(path)), float)


def keep_style(out: Path, share: float) -> dict:
    """Keeps the part of each domain of a cleaned set whose style is nearest to the usual one.

    Args:
        out: Folder that `cleaning.clean` wrote.
        share: Part of each domain's records to keep, above 0 and up to 1.

    Returns:
        The report, with one more filter.
    """
    if not 0 < share <= 1:
        raise ValueError(f"{SHARE}, but got {share}.")
    distances = style_distances(out / KEPT)
    members = defaultdict(list)
    for i, record in enumerate(read_lines(out / KEPT)):
        members[record["domain"]].append(i)
    keep = np.zeros(len(distances), bool)
    for rows in members.values():
        nearest = np.argsort(distances[rows], kind="stable")[: max(1, round(share * len(rows)))]
        keep[np.array(rows)[nearest]] = True
    return _keep(out, keep, "style", (f"distance {d:.2f} from the usual style" for d in distances))


def keep_difficult(out: Path, model, tokenizer, share: float, **options) -> dict:
    """Keeps the part of each domain of a cleaned set with the highest instruction-following difficulty.

    Args:
        out: Folder that `cleaning.clean` wrote.
        model: The model that is asked; see `trainers.ifd.ifd_scores`.
        tokenizer: Its tokenizer, with a chat template.
        share: Part of each domain's records to keep, above 0 and up to 1.
        options: More of `ifd_scores`.

    Returns:
        The report, with one more filter.
    """
    # heavy, and only needed here
    from datasets import Dataset

    from trainers.ifd import ifd_scores, select_by_ifd

    if not 0 < share <= 1:
        raise ValueError(f"{SHARE}, but got {share}.")
    with tempfile.TemporaryDirectory(dir=out, prefix=".ifd-") as folder:
        # on disk: what is in memory is one batch
        dataset = Dataset.from_generator(_numbered, gen_kwargs={"path": str(out / KEPT)}, cache_dir=folder)
        scores = ifd_scores(model, tokenizer, dataset, **options)
        chosen = select_by_ifd(dataset, scores, share)["number"]
    keep = np.zeros(len(scores), bool)
    keep[list(chosen)] = True
    return _keep(out, keep, "ifd", (f"IFD {score:.3f}" for score in scores))


def _numbered(path: str) -> Iterator[dict]:
    for number, record in enumerate(read_lines(Path(path))):
        yield {"messages": record["messages"], "domain": record["domain"], "number": number}


def _keep(out: Path, keep: np.ndarray, name: str, why: Iterable[str]) -> dict:
    """Moves the others from the kept to the dropped, with their rows in the input that was cleaned."""
    report = json.loads((out / REPORT).read_text())
    gone = np.fromiter((line["row"] for line in read_lines(out / DROPPED)), int)
    rows = np.setdiff1d(np.arange(1, report["records"] + 1), gone)
    with tempfile.TemporaryDirectory(dir=out, prefix=".cleaning-") as folder:
        parts = {file: Path(folder) / file for file in (KEPT, DROPPED)}
        shutil.copyfile(out / DROPPED, parts[DROPPED])
        with lines_file(parts[KEPT]) as kept, lines_file(parts[DROPPED], "a") as dropped:
            for stays, row, reason, record in zip(keep, rows, why, read_lines(out / KEPT), strict=True):
                if stays:
                    kept.write(line_of(record))
                else:
                    write_dropped(dropped, int(row), name, reason, record)
                    counts = report["domains"][record["domain"]]
                    counts["kept"] -= 1
                    counts[name] = counts.get(name, 0) + 1
        for file, part in parts.items():
            part.replace(out / file)
    report["filters"].append(name)
    return write_report(out, {key: report[key] for key in ("filters", "domains")})
