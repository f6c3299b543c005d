"""The pages of strategies and of the field: their commands exist, and each row says what it must."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tests.support.pages import parse
from trainers import JointStageConfig


DOCS = Path(__file__).parents[2] / "docs"
FIELD = (DOCS / "field.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in FIELD.splitlines() if re.match(r"\| (?!-|system |paper )", line)]
COMMANDS = [*dict.fromkeys(re.findall(r"`(ultrafuser [^`]+ [^`]+)`", FIELD + (DOCS / "strategies.md").read_text()))]
VERDICTS = {"works", "works, in part", "special case", "left out", "no mechanism"}


def test_there_are_rows_and_commands():
    assert len(ROWS) > 40
    assert len(COMMANDS) > 30


def test_every_paper_has_one_row_with_a_verdict_and_words():
    assert not [row for row in ROWS if len(row) != 3 or row[1] not in VERDICTS or not row[2]]
    papers = [row[0] for row in ROWS]
    assert len(set(papers)) == len(papers)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_that_it_names(command):
    words = shlex.split(command)
    parse(words)
    assert all((DOCS.parent / word).is_file() for word in words if word.startswith("examples/"))
    if words[1] == "train":
        # which hands on what it does not know itself
        settings = {f"--{field.name.replace('_', '-')}" for field in fields(JointStageConfig)}
        own = {"--stage", "--model", "--data", "--out"}
        assert not [word for word in words if word.startswith("--") and word not in settings | own]
