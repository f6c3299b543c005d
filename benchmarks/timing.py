"""Ways to be compared take turns, so that whatever else the machine does meets all of them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def compare(ways: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, dict]:
    """Measures every way once per round.

    Args:
        ways: Name to a function that does the work, not for the first time, and returns quantity to number.
        rounds: How often.

    Returns:
        Name to quantity to its ratio to the first way in the same round, as median, least and most over rounds, with
        the median of the numbers themselves as "value".
    """
    found = [{name: run() for name, run in ways.items()} for _ in range(rounds)]
    first = next(iter(ways))
    table = {}
    for name in ways:
        table[name] = {}
        for quantity in found[0][name]:
            ratios = [once[name][quantity] / once[first][quantity] for once in found]
            table[name][quantity] = spread(ratios) | {
                "value": statistics.median(once[name][quantity] for once in found)
            }
    return table


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    numbers = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {key: round(number, 3) for key, number in numbers.items()}


def held(field: str, file: str = "status") -> int:
    """Bytes of memory of this process, as a file of /proc/self says."""
    line = next(line for line in (Path("/proc/self") / file).read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
