"""The openings that CONTRIBUTING.md's section on language rejects, searched for in the source: nothing is imported."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling_ultrafuser", "trainers", "ultrafuser", "experiments", "benchmarks", "examples", "docs")
DOCSTRING = re.compile(r"(What|Whether|Which|Where|How|Of)\b")
HELP = re.compile(r"(What|Whether|Of|Such)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def openings(source):
    """Line numbers and first lines of docstrings and help texts that open badly."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and DOCSTRING.match(text := ast.get_docstring(node) or ""):
            yield node.body[0].lineno, text.partition("\n")[0]
        yield from ((text.lineno, text.value) for text in helps(node) if HELP.match(text.value))


def helps(node):
    """String constants that are help texts: `help="..."` in a call, `"help": "..."` in a dict."""
    pairs = []
    if isinstance(node, ast.keyword):
        pairs = [(node.arg, node.value)]
    elif isinstance(node, ast.Dict):
        pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
    return [v for k, v in pairs if k == "help" and isinstance(v, ast.Constant) and isinstance(v.value, str)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_or_help_text_opens_as_a_riddle(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in openings(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        '"""What is drawn of a domain."""',
        'def f():\n    """Whether a length has been thought of."""',
        'class C:\n    """Of requests: their fields."""',
        'Option(help="Of each answer.")',
        'field(metadata={"help": "Of the gate."})',
    ],
)
def test_bad_openings_are_found(source):
    assert len(list(openings(source))) == 1


def test_good_openings_are_not():
    assert not list(openings('"""Draws whatever is left of a domain."""\nOption(help="Most tokens of each answer.")'))
