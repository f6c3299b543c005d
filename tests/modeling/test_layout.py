"""Who may import whom, read from the source: nothing is imported to find out."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# each may import those before it, and none after it
ORDER = ("modeling_ultrafuser", "trainers", "ultrafuser", "examples")
FOLDERS = (*ORDER, "experiments", "benchmarks")


def imports(folder):
    """Every import of every file: (file, line, dots, module or None)."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
            if isinstance(node, ast.Import):
                yield from ((path.name, node.lineno, 0, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path.name, node.lineno, node.level, node.module


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    allowed = {*FOLDERS[: FOLDERS.index(folder)], folder}
    if folder not in ORDER:  # nothing is built on examples
        allowed -= {"examples"}
    forbidden = {*FOLDERS, "tests"} - allowed
    wrong = [i for i in imports(folder) if i[2] == 0 and i[3].split(".")[0] in forbidden]
    assert not wrong


def test_the_modelling_code_needs_torch_and_transformers_only():
    tops = {module.split(".")[0] for _, _, dots, module in imports("modeling_ultrafuser") if dots == 0}
    assert tops - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_the_modelling_code_is_flat_and_refers_to_itself_in_the_one_form_that_travels():
    folder = ROOT / "modeling_ultrafuser"
    assert not [p for p in folder.rglob("*.py") if p.parent != folder]
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    relative = [i for i in imports("modeling_ultrafuser") if i[2] > 0]
    assert relative
    assert not [i for i in relative if i[2] != 1 or i[3] not in files]


def test_every_file_of_the_modelling_code_travels():
    """A file is copied if it is reached from the model's file, and one that is not reached cannot be needed."""
    folder = ROOT / "modeling_ultrafuser"
    reached, waiting = set(), {"modeling_ultrafuser", "configuration_ultrafuser"}
    edges = [(file.removesuffix(".py"), module) for file, _, dots, module in imports("modeling_ultrafuser") if dots]
    while waiting:
        reached |= waiting
        waiting = {module for file, module in edges if file in reached} - reached
    assert reached == {p.stem for p in folder.glob("*.py")} - {"__init__"}


def test_module_names_tell_whose_they_are():
    """They lie in the user's folder beside the weights."""
    names = {p.stem for p in (ROOT / "modeling_ultrafuser").glob("*.py")} - {"__init__"}
    assert not [n for n in names if not n.endswith("_ultrafuser")]
