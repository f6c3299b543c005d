"""The skill that comes with the package: its commands parse, its errors exist, and it is put where agents look."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.support.pages import ROOT, blocks, commands, parse
from ultrafuser import skills
from ultrafuser.cli.app import app


FILE = Path(skills.__file__).parent / "ultrafuser" / "SKILL.md"
LINES = [words for block in blocks(FILE) for pipe in commands(block.text) for words in pipe]


def test_it_names_itself_and_says_when_to_use_it():
    head = yaml.safe_load(skills.text().split("---")[1])
    # the form's own limits
    assert (head["name"], len(head["description"]) <= 1024) == (FILE.parent.name, True)
    assert len(skills.text().splitlines()) < 120


@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(words[:2]))
def test_commands_parse(words):
    parse(words)


def test_what_one_does_in_order_is_there():
    used = [words[1] for words in LINES]
    wanted = ["check", "fuse", "gates", "evaluate", "push"]
    assert [name for name in dict.fromkeys(used) if name in wanted] == wanted


def test_errors_are_those_of_the_code():
    quoted = re.findall(r"^\| `(.+?)` \|", skills.text(), re.MULTILINE)
    assert len(quoted) > 5
    sources = [
        p.read_text()
        for folder in ("modeling_ultrafuser", "trainers", "ultrafuser")
        for p in (ROOT / folder).rglob("*.py")
    ]
    # strings go on in the next line
    code = re.sub(r'"\n\s*r?f?"', "", "\n".join(sources))
    assert not [text for text in quoted if text not in code]


def test_the_command_writes_it_and_replaces_no_other_unasked(tmp_path):
    def run(*options):
        return CliRunner().invoke(app, ["skill", str(tmp_path / "skills"), *options])

    written = tmp_path / "skills" / "ultrafuser" / "SKILL.md"
    for _ in range(2):
        assert run().exit_code == 0
        assert written.read_text() == skills.text()
    written.write_text("mine")
    shown = run()
    assert (shown.exit_code, written.read_text()) == (2, "mine")
    assert "--overwrite" in shown.output
    assert run("--overwrite").exit_code == 0
    assert written.read_text() == skills.text()
