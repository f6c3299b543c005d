"""What models, cards and names say reaches terminals and pages as text, and does nothing there."""

import io
import json
import re

import pytest
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from modeling_ultrafuser.plan_base_ultrafuser import Finding
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import specialist, tokenizer
from ultrafuser.check import render
from ultrafuser.check.checks import Judgement
from ultrafuser.cli.app import app
from ultrafuser.data import cleaning
from ultrafuser.plain import Console, echo, markdown, plain
from ultrafuser.reports.explanation import Token
from ultrafuser.reports.terminal import print_tokens
from ultrafuser.serve.chat import Chat


TITLE = "\x1b]0;pwned\x07"
ATTACKS = {
    "title": TITLE,
    "colour": "\x1b[31m",
    "C1": "\x9b31m\x9d0;pwned\x9c",
    "clear": "\x1bc\x1b[2J",
    "backspaces": "safe\x08\x08\x08\x08evil",
    "carriage return": "safe\revil",
    "bidi": "user\u202enimda\u2066x",
    "tags": "a\U000e0041b",
    "bell": "\x07",
}
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")
# what rich itself writes to colour
OURS = re.compile("\x1b\\[[0-9;]*m")


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nothing_in_a_text_is_obeyed(attack, capsys):
    assert not OBEYED.search(plain(attack))
    echo(attack)
    echo(ValueError(attack), err=True)
    said = capsys.readouterr()
    assert not OBEYED.search(said.out + said.err)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    table = Table(title=attack)
    table.add_column(attack)
    table.add_row(attack)
    for what in (attack, table, Text(attack, "bold red"), f"[link=file:///etc]{attack}[/link]"):
        console.print(what)
    assert not OBEYED.search(OURS.sub("", console.file.getvalue()))
    assert "\x1b]8" not in console.file.getvalue()


def test_ordinary_text_stays_as_it_is():
    for text in ("héllo, 日本語\n\tעברית 👩‍👩‍👧 café", "a\r\nb".replace("\r", "")):
        assert plain(text) == text
    assert plain("a\r\nb") == "a\nb"
    assert plain("\ud83d") == "\ufffd"


def test_colours_that_are_ours_stay():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("red", "red"))
    assert OURS.search(console.file.getvalue())


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_chat_prints_what_the_model_says_as_text(attack, fused):
    console = RichConsole(file=io.StringIO(), width=200)
    chat = Chat(fused, tokenizer(chat_template=CHAT_TEMPLATE), console)
    chat._print(attack, fused.gate_weights(tokenizer()("ab", return_tensors="pt")["input_ids"])[0, -1])
    bad = "{{ raise_exception(" + json.dumps(attack) + ") }}"
    Chat(fused, tokenizer(chat_template=bad), console).answer("hello")
    Chat(fused, tokenizer(chat_template=bad), console).run(["/" + attack])
    assert not OBEYED.search(console.file.getvalue())


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_explaining_and_checking_print_text(colours):
    console = RichConsole(file=io.StringIO(), width=200, force_terminal=bool(colours), color_system=colours)
    tokens = [Token(TITLE, 1)]
    all_of_them = {"fused": 1, "a": 1, "b": 1}
    tokens += [
        Token(attack, 2, False, {"a": 0.6, "b": 0.4}, all_of_them, spreads=all_of_them) for attack in ATTACKS.values()
    ]
    print_tokens(tokens, console)
    judgement = Judgement({})
    judgement.findings.append(Finding("licence", "fits", f"the licence is {TITLE}", TITLE))
    render.show(judgement, console)
    assert not OBEYED.search(OURS.sub("", console.file.getvalue()))


def test_the_table_of_what_was_cleaned_is_text():
    report = {"domains": {TITLE: {"kept": 1}}, "filters": ["short"], "dropped": {}, "kept": 1}
    assert not OBEYED.search(cleaning.table(report))


def test_an_error_that_quotes_a_card_or_a_name_prints_it_as_text(tmp_path):
    folder = tmp_path / "model"
    specialist(layers=1).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "x\u202e" + TITLE}))
    for command in (["explain", folder, "hello"], ["card", folder], ["card", f"{folder}{TITLE}"]):
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 2
        assert not OBEYED.search(done.output)


def test_on_a_page_words_of_others_are_words():
    said = markdown("<script>alert(1)</script> [click](javascript:alert(1)) | cell\n# heading" + TITLE)
    assert "<" not in said
    assert "\\[click\\]" in said
    assert "\\|" in said
    assert "\n" not in said
    assert not OBEYED.search(said)
