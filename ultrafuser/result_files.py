"""Files of results and of training's course, read with every field's kind checked: what is wrong is named."""

from collections.abc import Callable, Mapping
from pathlib import Path

from modeling_ultrafuser.files_ultrafuser import UnreadableFileError, read_json


Check = Callable[[object], bool]
MOST_ROWS = 1000


def read_results(path: Path, *, benchmarks: bool = False) -> dict:
    """Reads `results.json`, as `ultrafuser evaluate` and `ultrafuser judge` write it; later versions may have more fields.

    Args:
        path: Of the file.
        benchmarks: Accept what `ultrafuser bench` writes for a task, too.

    Raises:
        UnreadableFileError: Naming the file, and the first field that is missing or of another kind.
        OSError: If it is not there.
    """
    found = read_json(path)
    if benchmarks and "scores" in found:
        check_fields(path, found, _BENCHMARK, needed=tuple(_BENCHMARK))
        return found
    if "rows" not in found and "judge" not in found:
        fact = f"{str(path)!r} holds {str(sorted(found))[:300]}"
        bench = ", `ultrafuser bench`" if benchmarks else ""
        rule = f"Results come from `ultrafuser evaluate`{bench} or `ultrafuser judge`"
        raise UnreadableFileError(fact, rule, "Pass what one of those wrote.")
    if "rows" in found:
        check_fields(path, found, _COMPARISON, needed=("specialists",))
        for number, row in enumerate(found["rows"], 1):
            check_fields(path, row, _ROW, needed=("name", "kind", "mean", "loss"), where=f"row {number}: ")
        _check_gate(path, found["specialists"], found.get("gate") or {})
    else:
        check_fields(path, found, _JUDGEMENT, needed=("method", "questions", "judge"))
        score = "win_rate" if found["method"] == "pairwise" else "score"
        check_fields(path, found, {}, there=(score, "interval", "unjudged"))
    return found


def check_fields(
    path: Path,
    found: Mapping,
    checks: Mapping[str, Check],
    *,
    needed: tuple[str, ...] = (),
    there: tuple[str, ...] = (),
    where: str = "",
) -> None:
    """Refuses fields of another kind, and those that are missing.

    Args:
        path: Of the file.
        found: What it holds.
        checks: Whether a field's value is of its kind, by name. Null stands for nothing, and other fields for themselves.
        needed: Fields that must have a value.
        there: Fields that must be there, perhaps as null.
        where: In the file.

    Raises:
        UnreadableFileError: Naming the file and the field.
    """
    for key in (*needed, *there):
        if key not in found or (key in needed and found[key] is None):
            raise _damaged(path, f"{where}it has no `{key}`")
    for key, fits in checks.items():
        if found.get(key) is not None and not fits(found[key]):
            raise _damaged(path, f"{where}`{key}` cannot be {str(found[key])[:100]!r}")


def whole(value: object) -> bool:
    """Returns whether a value is a count: an integer from 0 that fits 64 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def number(value: object) -> bool:
    """Returns whether a value is a number."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def word(value: object) -> bool:
    """Returns whether a value is a string."""
    return isinstance(value, str)


def every(fits: Check) -> Check:
    """The same of a list."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def by_name(fits: Check) -> Check:
    """The same of an object's values."""
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _pair(value: object) -> bool:
    return every(number)(value) and len(value) == 2


def _or_none(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


_COMPARISON = {
    "specialists": lambda value: every(word)(value) and bool(value),
    "rows": lambda value: (
        isinstance(value, list) and len(value) <= MOST_ROWS and all(isinstance(row, dict) for row in value)
    ),
    "gate": lambda value: isinstance(value, dict),
    "left_out": by_name(word),
    "versions": by_name(word),
}
_ROW = {
    **dict.fromkeys(("name", "kind"), word),
    **dict.fromkeys(("mean", "difference", "p", "positive_flips", "negative_flips", "retention"), number),
    **dict.fromkeys(("mean_interval", "difference_interval"), _pair),
    **dict.fromkeys(("loss", "accuracy", "calibration_error"), by_name(number)),
    "loss_interval": by_name(_or_none(_pair)),
    "cost": by_name(_or_none(number)),
}
_GATE = {
    "mean_weights": by_name(by_name(number)),
    "entropy": by_name(number),
    "bin_tokens": whole,
    "weights_by_position": by_name(every(every(number))),
}
_JUDGEMENT = {
    "method": lambda value: value in ("pairwise", "grading"),
    **dict.fromkeys(("questions", "judge"), word),
    **dict.fromkeys(("win_rate", "score"), number),
    "interval": _pair,
    "unjudged": whole,
}
_BENCHMARK = {
    "task": word,
    "scores": by_name(by_name(lambda value: isinstance(value, dict) and number(value.get("value")))),
    "settings": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
}


def _check_gate(path: Path, specialists: list[str], gate: Mapping) -> None:
    needed = ("bin_tokens",) if gate.get("weights_by_position") else ()
    check_fields(path, gate, _GATE, needed=needed, where="of the gate ")
    means, bins = gate.get("mean_weights") or {}, gate.get("weights_by_position") or {}
    shown = {*(gate.get("entropy") or ()), *bins}
    lacking = [d for d, weights in means.items() if weights.keys() != set(specialists)]
    lacking += sorted(shown - means.keys())
    lacking += [d for d, rows in bins.items() if not rows or any(len(row) != len(specialists) for row in rows)]
    if lacking:
        raise _damaged(
            path, f"of the gate it has a weight for each specialist in every domain, but not in {lacking[0]!r}"
        )


def _damaged(path: str | Path, reason: str) -> UnreadableFileError:
    fact = f"{str(path)!r} is damaged, or none of this command's files: {reason}"
    return UnreadableFileError(fact, "", "Write it anew.")
