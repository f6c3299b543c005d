"""Files and functions that CONTRIBUTING.md and AGENTS.md name."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WALKS = TEXT[TEXT.index("## Three walks") : TEXT.index("## Language")]
STEPS = sorted(set(re.findall(r"`([\w/]+\.py)`\s`([\w.]+)`", WALKS)))


def defined(nodes, name):
    """Returns whether a class or function, or a class's method, is defined."""
    first, _, rest = name.partition(".")
    inside = next((node for node in nodes if getattr(node, "name", None) == first), None)
    return inside is not None and (not rest or defined(inside.body, rest))


@pytest.mark.parametrize(("file", "name"), STEPS)
def test_every_step_of_the_walks_is_there(file, name):
    (path,) = (
        ROOT / folder / file for folder in ("", "modeling_ultrafuser", "trainers") if (ROOT / folder / file).is_file()
    )
    assert defined(ast.parse(path.read_text()).body, name)


def test_there_are_three_walks_of_several_steps():
    assert WALKS.count("\n1. ") == 3
    assert len(STEPS) > 10


def test_the_guide_is_read_in_ten_minutes():
    assert len(TEXT.split()) / 200 < 10


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "AGENTS.md"])
def test_files_that_are_named_are_there(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:tests|docs|ultrafuser|trainers|experiments|modeling_ultrafuser)/[\w./]*)`", text)
    assert named
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
