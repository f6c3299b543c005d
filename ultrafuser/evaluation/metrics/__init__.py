"""Metrics that the `evaluate` library loads from a folder, offline: `evaluate.load(path("flips"))`."""

from pathlib import Path


NAMES = ("calibration_error", "flips", "nats_per_token")


def path(name: str) -> str:
    """Where a metric lies, for `evaluate.load`.

    Raises:
        ValueError: If there is none of this name, listing the names.
    """
    if name not in NAMES:
        raise ValueError(f"There are the metrics {list(NAMES)}, but got {name!r}.")
    return str(Path(__file__).parent / name)
