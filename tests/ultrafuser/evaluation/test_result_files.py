"""Files of results that are damaged, or were never results: every command that reads one names it and what is wrong."""

import copy
import json
import os

import pytest
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.comparisons import COMPARISON, JUDGEMENT, NAMES
from tests.support.tiny import specialist
from trainers.stage_checkpoint import STATE_FILE
from ultrafuser.cli.app import app
from ultrafuser.evaluation.comparison import SCORES, _check_identity, _file_names, _kept
from ultrafuser.result_files import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "fused"
    models = {name: specialist(layers=1, hidden_size=16) for name in NAMES}
    UltraFuserForCausalLM.from_specialists(models).save_pretrained(path)
    return path


def changed(whole, *place, value):
    """A copy with another value in one place."""
    whole = copy.deepcopy(whole)
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return whole


TEXTS = {
    "no JSON": (json.dumps(COMPARISON)[:300], "does not hold JSON"),
    "a list": ("[1, 2]", "holds a list instead of an object in JSON"),
    "nothing": ("", "does not hold JSON"),
    "brackets": ("[" * 100_000, "does not hold JSON"),
    "deep": ('{"rows": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
    "no results": ('{"loss": 1}', "holds ['loss']"),
}
FIELDS = {
    "specialists": (("specialists",), None, "no `specialists`"),
    "specialists' kind": (("specialists",), [], "`specialists` cannot be '[]'"),
    "rows": (("rows",), 3, "`rows` cannot be '3'"),
    "a row": (("rows", 1), "x", "`rows` cannot be"),
    "a row's name": (("rows", 1, "name"), None, "row 2: it has no `name`"),
    "a row's name's kind": (("rows", 1, "name"), ["x"], "row 2: `name` cannot be"),
    "a mean": (("rows", 0, "mean"), "1.5", "row 1: `mean` cannot be '1.5'"),
    "a large mean": (("rows", 0, "mean"), 10**400, "row 1: `mean` cannot be '1000"),
    "losses": (("rows", 0, "loss"), [1.0], "row 1: `loss` cannot be '[1.0]'"),
    "a loss": (("rows", 0, "loss"), {"text": True}, "row 1: `loss` cannot be"),
    "an interval": (("rows", 2, "mean_interval"), [1, 2, 3], "row 3: `mean_interval` cannot be '[1, 2, 3]'"),
    "a gate": (("gate",), "mlp", "`gate` cannot be 'mlp'"),
    "gate weights": (("gate", "mean_weights"), {"text": 0.5}, "of the gate `mean_weights` cannot be"),
    "a gate weight": (("gate", "mean_weights", "text"), {"text": 1.0}, "but not in 'text'"),
    "an entropy": (("gate", "entropy"), {"law": 0.5}, "but not in 'law'"),
    "positions": (("gate", "weights_by_position"), {"text": [[1.0]]}, "of the gate it has no `bin_tokens`"),
    "versions": (("versions",), "2.0", "`versions` cannot be '2.0'"),
}


def refused(command, file, words):
    shown = CliRunner().invoke(app, command)
    flat = " ".join(shown.output.split())
    assert shown.exit_code == 2, shown.output
    assert isinstance(shown.exception, SystemExit)
    assert str(file) in flat
    assert words in flat


@pytest.mark.parametrize("fault", [*TEXTS, *FIELDS])
def test_damaged_results_are_refused_by_name_by_report_and_card(fault, folder, tmp_path):
    file = tmp_path / "results.json"
    if fault in TEXTS:
        text, words = TEXTS[fault]
    else:
        place, value, words = FIELDS[fault]
        text = json.dumps(changed(COMPARISON, *place, value=value))
    file.write_text(text)
    refused(["report", str(file), "--out", str(tmp_path / "out")], file, words)
    assert not (tmp_path / "out").exists()
    refused(["card", str(folder), "--results", str(file)], file, words)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("rows", 1, "difference"), None, "of 'lucky router' it has no `difference`"),
        (("rows", 0, "name"), "fuzed", "one row 'fused'"),
        (("rows", 3, "loss"), {"text": 1.0}, "a loss of every row in every domain"),
        (("rows", 0, "accuracy"), None, "of 'fused' it has no `accuracy`"),
        (("gate",), None, "it has no `gate`"),
        (("gate", "entropy"), {}, "of the gate's entropy it has no `text`"),
    ],
)
def test_a_card_is_not_written_without_what_it_tells(place, value, words, folder, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(changed(COMPARISON, *place, value=value)))
    refused(["card", str(folder), "--results", str(file)], file, words)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("method",), "voting", "`method` cannot be 'voting'"),
        (("win_rate",), "most", "`win_rate` cannot be 'most'"),
        (("interval",), 3, "`interval` cannot be '3'"),
        (("judge",), 7, "`judge` cannot be '7'"),
        (("unjudged",), -1, "`unjudged` cannot be '-1'"),
    ],
)
def test_damaged_judgements_are_refused_by_name(place, value, words, folder, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(changed(JUDGEMENT, *place, value=value)))
    refused(["card", str(folder), "--results", str(file)], file, words)


def test_judgements_alone_are_no_report(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(JUDGEMENT))
    shown = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 2
    assert "pass `results` of `ultrafuser evaluate`" in " ".join(shown.output.split())


def test_a_pipe_is_no_file_of_results(folder, tmp_path):
    file = tmp_path / "results.json"
    os.mkfifo(file)
    refused(["report", str(file), "--out", str(tmp_path / "out")], file, "Only ordinary files are read")
    refused(["card", str(folder), "--results", str(file)], file, "Only ordinary files are read")


def test_whole_results_are_read_as_they_are(tmp_path):
    file = tmp_path / "results.json"
    for whole in (COMPARISON, JUDGEMENT, {**JUDGEMENT, "win_rate": None, "interval": None}):
        file.write_text(json.dumps(whole))
        assert read_results(file) == whole


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("trainer_state.json", "{", "does not hold JSON"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": "x"}], "global_step": 1}', "`log_history`"),
        ("trainer_state.json", '{"log_history": []}', "no `global_step`"),
        (STATE_FILE, "[]", "instead of an object"),
        (STATE_FILE, '{"domains": ["a"], "mixes": [[0]]}', "`mixes`"),
    ],
)
def test_a_damaged_checkpoint_is_named_by_report(name, content, words, tmp_path):
    checkpoint = tmp_path / "stage-one" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}], "global_step": 1}')
    (checkpoint / STATE_FILE).write_text('{"domains": ["a", "b"], "mixes": [[0, [0.5, 0.5]]]}')
    file = checkpoint / name
    file.write_text(content)
    results = tmp_path / "results.json"
    results.write_text(json.dumps(COMPARISON))
    command = ["report", str(results), "--training", str(checkpoint), "--out", str(tmp_path / "out")]
    refused(command, file, words)


def test_what_evaluate_has_finished_is_named_if_it_is_damaged(tmp_path):
    scores = tmp_path / SCORES
    scores.mkdir()
    (scores / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json.* does not hold JSON"):
        _check_identity(tmp_path, {})
    (scores / "fused.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"fused.safetensors.* is not whole: its header should have"):
        _kept(scores / "fused.safetensors", None)


def test_names_that_differ_in_case_alone_have_score_files_of_their_own():
    rows = ["Text specialist", "text specialist", "TEXT specialist", "text+specialist", "x" * 300, "X" * 300, "ä", "Ä"]
    names = _file_names(rows)
    assert list(names) == rows
    # on disks that do not tell cases apart, too
    assert len({name.lower() for name in names.values()}) == len(rows)
    assert all(len(name) < 120 and os.sep not in name for name in names.values())


def test_a_folder_of_another_run_is_refused_with_what_differs_by_name(tmp_path):
    _check_identity(tmp_path, {"data": {"text": "1f7d", "code": "5866"}, "examples": 200, "seed": 0})
    _check_identity(tmp_path, {"data": {"text": "1f7d", "code": "5866"}, "examples": 200, "seed": 0})
    with pytest.raises(
        ValueError, match=r"with other data of \['code'\]; examples \(200 there, 40 here\)\. Finished parts"
    ):
        _check_identity(tmp_path, {"data": {"text": "1f7d"}, "examples": 40, "seed": 0})
