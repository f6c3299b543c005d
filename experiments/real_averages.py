"""Reads the study's result files: which question who solved, and how sure a share or a difference of shares is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import ledger
from ultrafuser.evaluation.resampling import interval


FUSED, BASE, ORACLE = "fused", "base", "oracle"
# whose domain it is; text is the base's own
SPECIALISTS = {"text": BASE, "math": "math specialist", "code": "code specialist"}
# what nobody can have who does not know the answers
UNFAIR = (ORACLE, "oracle for each question")
DOMAIN_OF = {
    "products": "math",
    "arithmetic": "math",
    "school trained": "math",
    "school harder": "math",
    "school never trained": "math",
    "tasks": "code",
    "HumanEval": "code",
    "constraints": "text",
    "mixed": "both",
}
DOMAINS = ("math", "code", "functions", "text", "mixed")
# question to share of the seeds that solve it
Marks = Mapping[int, float]


class Estimate(NamedTuple):
    """Holds a mean with its 95 % bootstrap interval.

    Attributes:
        value: The mean.
        low: Lower end.
        high: Upper end.
        of: How many questions or conversations.
    """

    value: float
    low: float
    high: float
    of: int


def results(path: Path) -> dict[str, list[dict]]:
    """Reads all results of a folder by contender, a seed each, in the config's order and those it does not know behind.

    Raises:
        ValueError: If they are of different bases or adapters.
    """
    found: dict[str, list[dict]] = {}
    for file in sorted(path.glob("*.json")):
        one = json.loads(file.read_text())
        found.setdefault(one["name"], []).append(one)
    weights = {tuple(one.get("weights", ())) for own in found.values() for one in own}
    if len(weights) > 1:
        raise ValueError(
            f"Results are compared if they are of one base and the same adapters, but those in {str(path)!r} are of "
            f"{len(weights)}. Delete the older ones, and run `python -m experiments real` again."
        )
    order = {run.variant: i for i, run in enumerate(ledger.read("real"))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def parts(found: Mapping[str, list[dict]]) -> list[str]:
    """Lists parts that somebody was asked, in one order."""
    return [part for part in DOMAIN_OF if any(part in one["parts"] for own in found.values() for one in own)]


def marks(seeds: list[dict], part: str) -> Marks:
    """Returns the share of the seeds that solve each question; empty if the contender was not asked."""
    asked = [one["parts"][part] for one in seeds if part in one["parts"]]
    return {
        row: sum(own["right"][place] == "1" for own in asked) / len(asked)
        for place, row in enumerate(asked[0]["rows"] if asked else [])
    }


def estimate(values: list[float], counts: list[float] | None = None) -> Estimate | None:
    """Averages values, or sums over counts; None of nothing."""
    if not values:
        return None
    sums, counts = np.array(values, dtype=float), np.array(counts or [1.0] * len(values), dtype=float)
    return Estimate(float(sums.sum() / counts.sum()), *interval([(sums, counts)]), len(values))


def shared_questions(found: Mapping[str, list[dict]], part: str) -> set[int]:
    """Returns the questions that all were asked of those who were asked any."""
    asked = [set(own) for seeds in found.values() if (own := marks(seeds, part))]
    return set.intersection(*asked)


def share(seeds: list[dict], part: str, among: set[int] | None = None) -> Estimate | None:
    """Returns the share of a part, or of some of its questions, that a contender solves."""
    return estimate([mark for row, mark in marks(seeds, part).items() if among is None or row in among])


def difference(one: list[dict], other: list[dict], part: str) -> Estimate | None:
    """Subtracts the share of another contender, on the questions that both were asked."""
    mine, its = marks(one, part), marks(other, part)
    return estimate([mine[row] - its[row] for row in mine if row in its])


def kept(one: list[dict], others: Mapping[str, list[dict]]) -> Estimate | None:
    """Returns the share of what others solve that this one solves, too, over parts with another contender each."""
    mine, its = {part: marks(one, part) for part in others}, {part: marks(own, part) for part, own in others.items()}
    solved = [(part, row) for part in others for row in mine[part] if its[part].get(row)]
    return estimate(
        [mine[part][row] * its[part][row] for part, row in solved], [its[part][row] for part, row in solved]
    )


def loss(seeds: list[dict], domain: str) -> Estimate:
    """Averages nats per token of a domain's held-out answers over seeds."""
    return estimate(*_losses(seeds, domain))


def loss_difference(one: list[dict], other: list[dict], domain: str) -> Estimate:
    """Subtracts nats per token of another contender."""
    (mine, counts), (its, _) = _losses(one, domain), _losses(other, domain)
    return estimate([a - b for a, b in zip(mine, its, strict=True)], counts)


def _losses(seeds: list[dict], domain: str) -> tuple[list[float], list[float]]:
    own = [one["losses"][domain] for one in seeds]
    return [sum(nats) / len(own) for nats in zip(*(o["nats"] for o in own), strict=True)], own[0]["tokens"]


def right_specialist(found: Mapping[str, list[dict]], part: str) -> str:
    """Names the contender whose part it is; where two domains are needed, the specialist that solves most."""
    domain = DOMAIN_OF[part]
    if domain in SPECIALISTS:
        return SPECIALISTS[domain]
    return max(SPECIALISTS.values(), key=lambda name: share(found[name], part).value)
