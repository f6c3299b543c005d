"""The recipes of CONTRIBUTING.md, each applied to a copy of the repository: one file, one line, and all of it works."""

import ast
import multiprocessing
import re
import shutil
from pathlib import Path

import pytest

from tests.support import recipe_runs


ROOT = Path(__file__).parents[2]
RECIPES = re.compile(
    r"### (?P<title>[^\n]+)\n(?:(?!### ).)*?```python\n# (?P<file>[\w/]+\.py)\n(?P<code>.*?)```\n"
    r"(?:\nIn `(?P<table>[A-Z]+)` of `(?P<registry>[\w/]+\.py)`: `(?P<line>[^`]+)`)?",
    re.DOTALL,
)
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPE = {match["title"]: match.groupdict() for match in RECIPES.finditer(TEXT)}
# what a recipe's strategy is put through
STRATEGIES = {
    "A gate": ("gate", "norm"),
    "A fusion rule": ("fusion", "square_roots"),
    "A sparsifier": ("gate-sparsifier", "at_least:0.2"),
}
OTHERS = {
    "A merge": ("merge", "median"),
    "A reward": ("reward", "perplexity"),
    "A benchmark": ("benchmark", "reloading"),
    "A command": ("new_command", "names"),
}


def applied(recipe, copy):
    """Copies the packages, writes the recipe's file and adds its line, with the import that it needs."""
    for folder in recipe_runs.OURS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / recipe["file"]
    assert not file.exists(), "the recipe's example has become a part of the project: choose another"
    file.write_text(recipe["code"])
    if recipe["registry"]:
        registry = copy / recipe["registry"]
        registry.write_text(with_line(registry.read_text(), recipe, file.stem))


def with_line(source, recipe, module):
    """Adds a line to the end of a dict or tuple, and an import below the others."""
    lines, body = source.splitlines(), ast.parse(source).body
    (table,) = (
        node
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == recipe["table"]
    )
    last = max(node.end_lineno for node in body if isinstance(node, ast.ImportFrom) and node.level)
    name = re.search(r"(\w+)(?:\.\w+)?(?:\(\))?,$", recipe["line"])[1]
    added = f"from . import {name}" if name == module else f"from .{module} import {name}"
    lines.insert(table.end_lineno - 1, f"    {recipe['line']}")
    lines.insert(last, added)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """New processes begin where the large libraries are imported and nothing of ours is."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "datasets", "trl", "typer"])
    yield context
    patch.undo()


def finished(processes, kind, arguments, copy, folder):
    log = folder / f"{kind}.log"
    process = processes.Process(target=recipe_runs.run, args=(kind, arguments, copy, log))
    process.start()
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-4000:]


def test_every_recipe_is_tried():
    assert set(RECIPE) == {*STRATEGIES, *OTHERS}


@pytest.mark.parametrize("title", STRATEGIES)
def test_a_strategy_works_as_those_that_are_there(title, processes, tmp_path):
    copy, folder = tmp_path / "copy", tmp_path / "work"
    folder.mkdir()
    applied(RECIPE[title], copy)
    finished(processes, "strategy", STRATEGIES[title], copy, folder)
    finished(processes, "elsewhere", [str(folder)], copy, folder)


@pytest.mark.parametrize("title", OTHERS)
def test_the_other_recipes_work(title, processes, tmp_path):
    copy, folder = tmp_path / "copy", tmp_path / "work"
    folder.mkdir()
    applied(RECIPE[title], copy)
    kind, word = OTHERS[title]
    finished(processes, kind, [word], copy, folder)
