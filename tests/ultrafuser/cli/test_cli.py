"""The command line: groups of commands, and what all commands have in common."""

import subprocess
import sys
from importlib import metadata

import pytest
import typer
from typer.testing import CliRunner

from ultrafuser.cli.app import GROUPS, app
from ultrafuser.cli.arguments import named
from ultrafuser.cli.data import group as data_group
from ultrafuser.cli.group import Group
from ultrafuser.source_names import load_arguments, split_source


def run(group, *words):
    whole = typer.Typer()
    whole.add_typer(group)
    whole.callback()(lambda: None)
    return CliRunner().invoke(whole, words)


def test_help_lists_every_command_in_the_panel_of_its_group():
    listed = CliRunner().invoke(app, ["--help"]).output
    places = []
    for group in GROUPS:
        names = [info.callback.__name__.replace("_", "-") for info in group.registered_commands]
        places += [listed.index(f"─ {group.title} ─"), *(listed.index(f"│ {name} ") for name in names)]
    assert places == sorted(places)
    assert all(info.rich_help_panel == data_group.title for info in data_group.registered_commands)


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, metadata.version("ultrafuser") + "\n")


def test_help_imports_nothing_large():
    code = "import sys, ultrafuser.cli.app\nfor name in ('torch', 'transformers', 'datasets', 'huggingface_hub', 'numpy'):\n"
    code += "    assert name not in sys.modules, name\n"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, FileExistsError])
def test_a_new_command_is_one_function_whose_errors_are_sentences(error):
    group = Group("New")

    @group.command()
    def fresh(word: str) -> None:
        """Does something new."""
        raise error(f"{word} does not fit.")

    assert "Does something new." in run(group, "--help").output
    done = run(group, "fresh", "this")
    assert done.exit_code == 2
    assert done.output == "this does not fit.\n"


def test_an_error_of_the_operating_system_names_its_file_and_no_number(tmp_path):
    group = Group("New")

    @group.command()
    def fresh(path: str) -> None:
        open(path).close()

    assert (
        run(group, "fresh", str(tmp_path / "gone")).output
        == f"There is no {str(tmp_path / 'gone')!r}. Check the spelling.\n"
    )
    assert (
        run(group, "fresh", str(tmp_path)).output == f"{str(tmp_path)!r} cannot be read or written: Is a directory.\n"
    )


def test_an_error_that_no_user_can_correct_keeps_its_traceback():
    group = Group("New")

    @group.command()
    def fresh() -> None:
        raise KeyError("a defect")

    assert isinstance(run(group, "fresh").exception, KeyError)


@pytest.mark.parametrize(("extra", "way"), [("eval", "pip install 'ultrafuser[eval]'"), (None, "")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(extra, way):
    group = Group("New", extra=extra)

    @group.command()
    def fresh() -> None:
        import a_package_that_nobody_has  # noqa: F401

    done = run(group, "fresh")
    assert done.exit_code == 2
    assert "'a_package_that_nobody_has', which is not installed" in done.output
    assert way in done.output


def test_a_warning_is_a_sentence_without_the_line_of_code_it_came_from():
    code = "import sys, warnings, ultrafuser.cli.app as cli\n"
    code += "cli.app = lambda: [warnings.warn('one\x1b[1m'), warnings.warn('two', FutureWarning)]\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "Warning: one␛[1m\nFutureWarning: two\n"


def test_names_and_values():
    assert named(["a=b", "c=d=e"], "--x") == {"a": "b", "c": "d=e"}
    assert named(None, "--x") == {}
    for wrong in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(typer.BadParameter, match="--x must"):
            named(wrong, "--x")
    with pytest.raises(typer.BadParameter, match="NAME=owner/model"):
        named(["owner/model"], "--x")


def test_sources_are_split_at_the_colon_unless_they_are_here(tmp_path):
    here = tmp_path / "set:part"
    here.mkdir()
    assert split_source("owner/set:test") == ("owner/set", "test")
    assert split_source("owner/set") == ("owner/set", None)
    assert split_source(str(here)) == (str(here), None)
    assert split_source("gone:1/rows.jsonl") == ("gone:1/rows.jsonl", None)
    assert load_arguments("owner/set") == {"path": "owner/set", "split": "train"}
    assert load_arguments("owner/set:test") == {"path": "owner/set", "split": "test"}
    assert load_arguments("rows.jsonl.gz") == {"path": "json", "data_files": "rows.jsonl.gz"}
