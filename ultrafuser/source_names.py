"""Parses the names of rows in commands: a JSON file, or a set on the Hub with something behind a colon.

`--data` and `--tune` take HUB_ID:SPLIT. `data clean --against` takes HUB_ID:CONFIG, since `--split` names the split.
"""

import os


ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def is_file(source: str) -> bool:
    """Returns whether this is a JSON file, by its ending."""
    return source.endswith(ENDINGS)


def split_source(source: str) -> tuple[str, str | None]:
    """Splits HUB_ID:REST at the colon. What is on this machine, and JSON files, are names as a whole."""
    if is_file(source) or os.path.exists(source):
        return source, None
    path, _, rest = source.partition(":")
    return path, rest or None


def load_arguments(source: str) -> dict[str, str]:
    """Returns the arguments of `load_dataset` for a JSON file or HUB_ID:SPLIT; without a split for "train"."""
    if is_file(source):
        return {"path": "json", "data_files": source}
    path, split = split_source(source)
    return {"path": path, "split": split or "train"}
