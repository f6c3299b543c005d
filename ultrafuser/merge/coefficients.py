"""The table of coefficients: the factor of every specialist's change, row by row of a model."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.refusals_ultrafuser import Refusal


EMBEDDINGS, END = "embeddings", "last norm and head"
FIELD = "coefficients"
RULE = "Every specialist has one coefficient, a number"


@dataclass
class Coefficients:
    """Factors by row and specialist. Rows are the embeddings, each layer, and the last norm with the head.

    Attributes:
        names: Of the specialists.
        rows: Factors of each row, in the order of the names. Shape (layers + 2, specialists).
    """

    names: list[str]
    rows: list[list[float]]

    @classmethod
    def constant(cls, factors: Mapping[str, float], layers: int) -> "Coefficients":
        """Makes a table with one factor of each specialist for all rows."""
        return cls(list(factors), [list(factors.values()) for _ in range(layers + 2)])

    @classmethod
    def lines(cls, names: Iterable[str], layers: int, start: float, slope: float) -> "Coefficients":
        """Makes the table of LiNeS, as its authors compute it (Wang et al., 2025, https://arxiv.org/abs/2410.17146).

        Args:
            names: Of the specialists.
            layers: Number of them.
            start: Factor of the first layer, and of all that is in no layer.
            slope: By how much the last layer's factor is above the first one's.
        """
        names = list(names)
        factors = [start + slope * layer / max(layers - 1, 1) for layer in range(layers)]
        return cls(names, [[factor] * len(names) for factor in (start, *factors, start)])

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.rows) - 2

    @property
    def is_even(self) -> bool:
        """Returns whether all rows are the same."""
        return all(row == self.rows[0] for row in self.rows)

    def of(self, key: str) -> list[float]:
        """Returns each specialist's factor of a parameter, by the parameter's name."""
        return self.rows[row_of(key, self.layers)]

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Returns factors by the names of row and specialist."""
        return {
            name: dict(zip(self.names, row, strict=True))
            for name, row in zip(row_names(self.layers), self.rows, strict=True)
        }


def row_names(layers: int) -> list[str]:
    """Names the rows of a model with so many layers."""
    return [EMBEDDINGS, *(f"layer {layer}" for layer in range(layers)), END]


def row_of(key: str, layers: int) -> int:
    """Returns a parameter's row: the first number in its name is that of its layer."""
    layer = re.search(r"\.(\d+)\.", key)
    if layer and int(layer[1]) < layers:
        return int(layer[1]) + 1
    return 0 if re.search(r"embed(?!_out)|\bw[tp]e\b", key) else layers + 1


def check_layers(keys: Iterable[str], layers: int) -> None:
    """Refuses models whose layers cannot be counted by their parameters' names.

    Raises:
        Refusal: If a layer has no parameter.
    """
    found = {row_of(key, layers) for key in keys}
    missing = [layer for layer in range(layers) if layer + 1 not in found]
    if missing:
        raise Refusal(
            f"no parameter is called after layer {missing[0]} of {layers}",
            "Factors that differ by layer need a number in each layer's name",
            "Give one factor for all layers.",
        )


def parse_coefficients(text: str | None, default: float, names: list[str], layers: int) -> Coefficients:
    """Reads a table of coefficients.

    Args:
        text: A number for all; NAME=NUMBER of each specialist with commas between them; or a JSON file as merges write it.
        default: Factor of all where nothing is given.
        names: Of the specialists.
        layers: Number of layers.

    Raises:
        Refusal: If it is none of these, does not name every specialist, or has other rows.
    """
    if text is not None and text.endswith(".json"):
        return _from_file(Path(text), names, layers)
    if text is None:
        return Coefficients.constant(dict.fromkeys(names, default), layers)
    pairs = [part.partition("=") for part in text.split(",")]
    even = len(pairs) == 1 and not pairs[0][1]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise Refusal(f"{text!r} names a specialist twice", RULE, "Name each once.")
    factors = dict.fromkeys(names, text) if even else {name: number for name, _, number in pairs}
    return Coefficients.constant(_numbers(factors, names, repr(text)), layers)


def _from_file(file: Path, names: list[str], layers: int) -> Coefficients:
    if not file.is_file():
        raise Refusal(f"there is no file {str(file)!r}", "A table is read from one", "Check the spelling.")
    table = read_json(file).get(FIELD)
    wanted = row_names(layers)
    if not isinstance(table, dict) or list(table) != wanted or not all(isinstance(r, dict) for r in table.values()):
        raise Refusal(
            f"{str(file)!r} has no table `{FIELD}` with the {len(wanted)} rows {wanted[0]!r}, {wanted[1]!r} to {wanted[-1]!r}",
            "A table has a row for the embeddings, for each layer and for what comes behind",
            "Begin with the file that a merge of these models wrote.",
        )
    rows = [_numbers(row, names, f"row {name!r} of {str(file)!r}") for name, row in table.items()]
    return Coefficients(names, [[row[name] for name in names] for row in rows])


def _numbers(factors: Mapping[str, str | float], names: list[str], where: str) -> dict[str, float]:
    if sorted(factors) != sorted(names):
        raise Refusal(
            f"{where} names {sorted(factors)}, and the specialists are {sorted(names)}", RULE, "Name them all."
        )
    numbers = {name: _number(factors[name]) for name in names}
    odd = next((name for name, number in numbers.items() if not math.isfinite(number)), None)
    if odd is not None:
        raise Refusal(f"{where} gives {odd!r} {factors[odd]!r}", RULE, "Write a number, such as 0.5.")
    return numbers


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def dump(table: Coefficients, **more) -> str:
    """Returns a table, and what else is worth keeping, as the JSON that `parse_coefficients` reads."""
    return json.dumps({**more, FIELD: table.as_dict()}, indent=1) + "\n"
