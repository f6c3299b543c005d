"""Questions for a model and a judge: read whole, and refused in words before anything is generated."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import snapshot_download


@dataclass(frozen=True)
class Question:
    """One conversation to hold with a model.

    Attributes:
        id: Unique within its set.
        category: Scores are also given by category.
        turns: What the user says, in order; the model answers each before it reads the next.
        reference: What the answers are held against, by turn: correct answers for grading, which may be absent, or
            another model's answers for pairwise comparison.
    """

    id: str
    turns: list[str]
    category: str = "all"
    reference: list[str] = field(default_factory=list)


def load_questions(source: str, revision: str | None = None) -> tuple[list[Question], str]:
    """Reads a set of questions.

    Args:
        source: A name of `HUB_SETS`, or a JSON Lines file with `id`, `turns` and, if wanted, `category` and
            `reference` in each row.
        revision: Branch, tag or commit of a set on the Hub. Pin a commit for results to be repeatable.

    Returns:
        The questions, and where they came from: the file, or the data set with the commit that was read.

    Raises:
        ValueError: Naming file, line and fault of rows that are no questions.
        OSError: If the file or data set cannot be read.
    """
    if source in HUB_SETS:
        return _from_hub(source, revision)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"Questions are a JSON Lines file or one of {sorted(HUB_SETS)}, but {source!r} is neither. Check the path."
        )
    if revision is not None:
        raise ValueError(
            f"A revision belongs to a data set on the Hub, but {source!r} is a file. Leave `revision` out."
        )
    return _from_file(path), str(path)


def _from_hub(name: str, revision: str | None) -> tuple[list[Question], str]:
    repository, files, to_question = HUB_SETS[name]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=files))
    except OSError as error:
        raise OSError(
            f"The questions of {name!r} could not be read from the Hub's data set {repository!r} (revision "
            f"{revision or 'main'!r}). Check the network and the revision, or pass a JSON Lines file. "
            f"The Hub client said: {str(error).splitlines()[0]}"
        ) from error
    found = sorted(str(p) for p in folder.glob(files))
    if not found:
        raise FileNotFoundError(
            f"The data set {repository!r} at {folder.name!r} holds no file {files!r}, so its layout has changed. "
            f"Pass an older `revision`, or a JSON Lines file."
        )
    kind = "parquet" if files.endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=found, split="train")
    # the folder of a snapshot is named after its commit
    return [to_question(number, row) for number, row in enumerate(rows)], f"{repository}@{folder.name}"


def _alpaca_eval(number: int, row: dict) -> Question:
    return Question(str(number), [row["instruction"]], row["dataset"], [row["output"]])


def _mt_bench(number: int, row: dict) -> Question:
    return Question(
        str(row["prompt_id"]), list(row["prompt"]), row["category"], [r for r in row["reference"] or [] if r]
    )


# name: data set, files in it, what makes a question of a row. AlpacaEval comes with text-davinci-003's answers as
# reference (Li et al., 2023), its second version with those of GPT-4 Turbo; MT-Bench is Zheng et al., arXiv 2306.05685
HUB_SETS = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval", "alpaca_eval.json", _alpaca_eval),
    "alpaca_eval_2": ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", _alpaca_eval),
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", "data/train-*.parquet", _mt_bench),
}


def _from_file(path: Path) -> list[Question]:
    questions, lines, faults = [], {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row, fault = _row(line)
        if fault is None and row["id"] in lines:
            fault = f"`id` {row['id']!r} is already that of line {lines[row['id']]}"
        if fault is not None:
            faults.append(f"line {number}: {fault}")
            continue
        lines[row["id"]] = number
        questions.append(Question(row["id"], row["turns"], row.get("category", "all"), row.get("reference") or []))
    if faults or not questions:
        raise ValueError(
            f"Every row must be a question, and nothing is generated before all are, but in {str(path)!r} "
            + ("there are no rows" if not faults else "; ".join(faults[:5]))
            + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
            + '. A row looks like {"id": "1", "category": "math", "turns": ["What is 2+2?"], "reference": ["4"]}.'
        )
    return questions


def _row(line: str) -> tuple[dict, str | None]:
    """The parsed line, and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"no JSON ({error.msg} at column {error.colno})"
    if not isinstance(row, dict):
        return {}, f"an object was expected, but got {type(row).__name__}"
    if missing := [key for key in ("id", "turns") if key not in row]:
        return row, f"{' and '.join(f'`{key}`' for key in missing)} missing, it has {sorted(row)}"
    row["id"] = str(row["id"])
    if not _texts(row["turns"]) or not row["turns"]:
        return row, f"`turns` must be a list of one or more texts, but is {row['turns']!r}"
    if not isinstance(row.get("category", ""), str):
        return row, f"`category` must be text, but is {row['category']!r}"
    reference = row.get("reference") or []
    if not _texts(reference) or len(reference) > len(row["turns"]):
        return row, f"`reference` must be a list of at most one text for each turn, but is {reference!r}"
    return row, None


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
