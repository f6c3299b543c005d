"""Documented functions of the standard library and of installed packages: from signature and docstring to the body.

Only short functions that need nothing but builtins and well-known modules of the standard library are taken.
"""

import ast
import builtins
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random

from experiments.real.coding import Task
from experiments.real.splitting import held_out


KNOWN_MODULES = {
    "math",
    "re",
    "itertools",
    "functools",
    "collections",
    "operator",
    "string",
    "random",
    "bisect",
    "heapq",
    "json",
    "os",
    "sys",
}
SKIPPED = {"test", "tests", "testing", "idlelib", "turtledemo", "lib2to3", "_vendor", "vendor", "vendored"}
PACKAGES = [
    "numpy",
    "sympy",
    "networkx",
    "pandas",
    "scipy",
    "sklearn",
    "nltk",
    "mpmath",
    "jinja2",
    "pygments",
    "matplotlib",
    "datasets",
]
LONGEST = 900  # characters of a function


def functions() -> list[Task]:
    """All usable functions of this machine, each once, in an order that does not depend on the machine's disk."""
    found: dict[str, Task] = {}
    for path in sorted(_files()):
        for task in functions_of(path):
            found.setdefault(task.code.split("(", 1)[1], task)
    return sorted(found.values(), key=lambda task: task.code)


def split(tasks: list[Task], wanted: bool) -> list[Task]:
    """The training (False) or held-out (True) part. Functions of one name are in the same part."""
    return [task for task in tasks if held_out("function", task.code.split("(")[0]) == wanted]


def _files() -> Iterator[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(sysconfig.get_path("purelib")) / name for name in PACKAGES]
    for root in roots:
        for folder, inner, files in os.walk(root):
            inner[:] = [d for d in inner if d not in SKIPPED and d != "site-packages"]
            yield from (Path(folder) / file for file in files if file.endswith(".py"))


def functions_of(path: Path) -> Iterator[Task]:
    """The usable functions of a file."""
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (task := _task(node)):
            yield task


def _task(node: ast.FunctionDef) -> Task | None:
    doc = ast.get_docstring(node)
    if not doc or node.decorator_list or node.end_lineno - node.lineno > 60 or not 2 <= len(node.body) <= 14:
        return None
    first = doc.split("\n\n")[0].replace("\n", " ").strip()
    missing = needed(node)
    if not 20 <= len(first) <= 250 or "deprecated" in doc.lower() or not missing <= KNOWN_MODULES:
        return None
    bare = ast.FunctionDef(node.name, node.args, node.body[1:], [], node.returns, None, lineno=1)
    code = ast.unparse(ast.fix_missing_locations(bare))
    if not 40 <= len(code) <= LONGEST or not code.isascii() or len(code.splitlines()) < 2:
        return None
    signature, _, _ = code.partition("\n")
    imports = "".join(f"import {name}\n" for name in sorted(missing))
    question = f'Complete this Python function:\n\n```python\n{imports}{signature}\n    """{first}"""\n```'
    return Task("function", question, (imports + "\n" if imports else "") + code, [])


def needed(node: ast.FunctionDef) -> set[str]:
    """Names that a function takes from outside and that are no builtins."""
    stored, loaded = {node.name}, set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            (loaded if isinstance(inner.ctx, ast.Load) else stored).add(inner.id)
        elif isinstance(inner, ast.arg):
            stored.add(inner.arg)
        elif isinstance(inner, ast.FunctionDef | ast.ClassDef):
            stored.add(inner.name)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            stored.update((alias.asname or alias.name).split(".")[0] for alias in inner.names)
        elif isinstance(inner, ast.ExceptHandler) and inner.name:
            stored.add(inner.name)
    return loaded - stored - set(dir(builtins))


def sample(tasks: list[Task], seed: int, count: int) -> list[Task]:
    """Some of the tasks."""
    return Random(f"functions {seed}").sample(tasks, min(count, len(tasks)))
