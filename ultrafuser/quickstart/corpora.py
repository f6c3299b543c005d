"""Real text in three domains that every machine has: prose, code and mathematics.

Prose is Python's own reference (`pydoc_data.topics`), code is the standard library's sources, mathematics is
arithmetic and algebra worked out with SymPy.
"""

import ast
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import sympy


DOMAINS = ("text", "code", "math")
SPLITS = {"specialist": 0.6, "fuse": 0.25, "held_out": 0.15}
X = sympy.Symbol("x")


def documents(domain: str, seed: int = 0, characters: int = 400_000) -> list[str]:
    """Documents of one domain in a random order, together about `characters` long, or all there are.

    Raises:
        KeyError: If the domain is unknown.
    """
    rng = random.Random(seed)
    found, total = [], 0
    for document in {"text": _prose, "code": _code, "math": _mathematics}[domain](rng):
        found.append(document)
        total += len(document)
        if total >= characters:
            break
    return found


def splits(documents: list[str]) -> dict[str, list[str]]:
    """Parts that share no document: one to make specialists, one to fuse them, one to measure with."""
    parts, start = {}, 0.0
    for name, share in SPLITS.items():
        parts[name] = documents[round(start * len(documents)) : round((start + share) * len(documents))]
        start += share
    return parts


def _prose(rng: random.Random):
    # the same paragraphs stand under several topics: each is kept once, so that no two parts share one
    seen, sections = set(), []
    for _, section in sorted(topics.items()):
        section = "\n".join(line.strip() for line in section.splitlines())
        fresh = [p for p in section.split("\n\n") if _is_prose(p) and p not in seen]
        seen.update(fresh)
        sections += ["\n\n".join(fresh[i : i + 4]) for i in range(0, len(fresh), 4)]
    rng.shuffle(sections)
    yield from sections


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c in " \n,.'\"" for c in paragraph)
    return len(paragraph) > 80 and letters > 0.87 * len(paragraph) and paragraph.rstrip()[-1] in ".:"


def _code(rng: random.Random):
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in library.glob("*.py") if f.stat().st_size < 200_000)
    files += sorted(f for f in library.glob("[a-z]*/*.py") if f.parts[-2] not in _NOT_OURS)
    rng.shuffle(files)
    for file in files:
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.unparse(_without_docstrings(node))
                if 120 < len(text) < 4000:
                    yield text


# installed packages, tests of broken syntax, and tables
_NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def _without_docstrings(node: ast.AST) -> ast.AST:
    # docstrings are prose
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(child):
            child.body = child.body[1:] or [ast.Pass()]
    return node


def _mathematics(rng: random.Random):
    makers = [_product, _sum, _linear_equation, _expansion, _factoring, _derivative]
    while True:
        yield "\n\n".join(rng.choice(makers)(rng) for _ in range(6))


def _product(rng: random.Random) -> str:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    tens, ones = b - b % 10, b % 10
    return f"What is {a} * {b}?\n{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"


def _sum(rng: random.Random) -> str:
    a, b, c = (rng.randint(10, 999) for _ in range(3))
    return f"What is {a} + {b} - {c}?\n{a} + {b} - {c} = {a + b} - {c} = {a + b - c}"


def _linear_equation(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 12), rng.randint(1, 40), rng.randint(41, 99)
    solution = sympy.solve(sympy.Eq(a * X + b, c), X)[0]
    return f"Solve {a}*x + {b} = {c} for x.\n{a}*x = {c} - {b} = {c - b}\nx = {c - b}/{a} = {solution}"


def _expansion(rng: random.Random) -> str:
    factors = [rng.randint(1, 5) * X + rng.choice([-1, 1]) * rng.randint(1, 9) for _ in range(2)]
    left = " * ".join(f"({f})" for f in factors)
    return f"Expand {left}.\n{left} = {sympy.expand(factors[0] * factors[1])}"


def _factoring(rng: random.Random) -> str:
    a, b = (rng.choice([-1, 1]) * rng.randint(1, 9) for _ in range(2))
    square = sympy.expand((X + a) * (X + b))
    return f"Factor {square}.\n{a} + {b} = {a + b} and {a} * {b} = {a * b}, so {square} = {sympy.factor(square)}"


def _derivative(rng: random.Random) -> str:
    f = sum(rng.randint(-9, 9) * X**power for power in range(4)) + X**4
    return f"Differentiate f(x) = {f}.\nf'(x) = {sympy.diff(f, X)}"
