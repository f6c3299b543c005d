"""Questions of DeepMind's Mathematics Dataset (Saxton et al., 2019), with the answer alone and no steps.

Its package is from 2019. It is unpacked, not installed, and the four lines that newer versions of NumPy and SymPy reject
are changed.
"""

import random
import sys
from pathlib import Path

from experiments.real.splitting import held_out
from experiments.real.unpacking import MATHEMATICS, unpacked
from experiments.real.worked_arithmetic import Item


TRAINED = [
    "algebra__linear_1d",
    "arithmetic__add_sub_multiple",
    "arithmetic__mul",
    "comparison__closest",
    "comparison__pair",
    "comparison__sort",
    "measurement__time",
    "numbers__gcd",
    "numbers__is_factor",
    "numbers__place_value",
    "numbers__round_number",
]
NEVER_TRAINED = [
    "algebra__linear_2d",
    "algebra__sequence_next_term",
    "arithmetic__add_or_sub",
    "comparison__kth_biggest",
    "measurement__conversion",
    "numbers__div_remainder",
    "polynomials__evaluate",
]
EASY = 0.4  # of the range of difficulty that a module trains on
LONGEST = 120  # characters of a question
CHANGES = [
    ("from sympy.solvers.diophantine import", "from sympy.solvers.diophantine.diophantine import"),
    ("dtype=np.object", "dtype=object"),
    ("coeffs.itemset(index, value)", "coeffs[index] = value"),
    ("expanded_coefficients.itemset(power, coeffs)", "expanded_coefficients[power] = coeffs"),
]


class School:
    """The modules of the dataset."""

    def __init__(self, folder: Path):
        source = unpacked(MATHEMATICS, folder)
        _modernise(source / "mathematics_dataset" / "sample" / "polynomials.py")
        sys.path.insert(0, str(source))
        try:
            from mathematics_dataset.modules import modules
        finally:
            sys.path.remove(str(source))
        self.trained = _flat(
            modules.train(lambda low_high: (low_high[0], low_high[0] + EASY * (low_high[1] - low_high[0])))
        )
        self.beyond = _flat(modules.test_extra())

    def training_items(self, seed: int, count: int) -> list[Item]:
        """Questions of the modules that are trained."""
        random.seed(f"school {seed}")
        _seed_numpy(seed)
        return [self._one(self.trained, random.choice(TRAINED), wanted=False) for _ in range(count)]

    def held_out_items(self, seed: int, count: int) -> dict[str, list[Item]]:
        """As many questions of each module: trained modules, harder ones of the same, modules never trained."""
        random.seed(f"school held out {seed}")
        _seed_numpy(seed + 1)
        harder = [name for name in self.beyond if any(name.startswith(trained) for trained in TRAINED)]
        return {
            "trained": [self._one(self.trained, n, wanted=True) for n in TRAINED for _ in range(count)],
            "harder": [self._one(self.beyond, n, wanted=True) for n in harder for _ in range(count)],
            "never trained": [self._one(self.trained, n, wanted=True) for n in NEVER_TRAINED for _ in range(count)],
        }

    @staticmethod
    def _one(modules: dict, name: str, wanted: bool) -> Item:
        while True:
            problem = modules[name]()
            question, answer = str(problem.question), str(problem.answer)
            if len(question) <= LONGEST and held_out("school", question) == wanted:
                return Item(name, question, f"Answer: {answer}", answer)


def _modernise(path: Path) -> None:
    text = path.read_text()
    for old, new in CHANGES:
        text = text.replace(old, new)
    path.write_text(text)


def _flat(modules: dict, start: str = "") -> dict:
    found = {}
    for name, value in modules.items():
        found |= _flat(value, f"{start}{name}__") if isinstance(value, dict) else {start + name: value}
    return found


def _seed_numpy(seed: int) -> None:
    import numpy

    numpy.random.seed(seed)
