"""Ways to be compared take turns, so that whatever else the machine does meets all of them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def compare_ways(ways: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, dict]:
    """Measures every way once per round.

    Args:
        ways: Name to a function that does the work, not for the first time, and returns quantity to number.
        rounds: How often.

    Returns:
        Name to quantity to its ratio to the first way in the same round, as median, least and most over rounds, with
        the median of the numbers themselves as "value".
    """
    runs = take_turns(ways, rounds)
    first = runs[next(iter(ways))]
    return {
        name: {
            quantity: spread(ratios(*([run[quantity] for run in of] for of in (own, first))))
            | {"value": statistics.median(run[quantity] for run in own)}
            for quantity in own[0]
        }
        for name, own in runs.items()
    }


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """Returns the measurements of every way, round by round: each runs once per round."""
    rounds_of_all = [{name: run() for name, run in ways.items()} for _ in range(rounds)]
    return {name: [once[name] for once in rounds_of_all] for name in ways}


def ratios(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    """Each number to the other of its round."""
    return [number / other for number, other in zip(numbers, others, strict=True)]


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    numbers = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {key: round(number, 3) for key, number in numbers.items()}


def held(field: str, file: str = "status") -> int:
    """Bytes of memory of this process, as a file of /proc/self says."""
    line = next(line for line in (Path("/proc/self") / file).read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
