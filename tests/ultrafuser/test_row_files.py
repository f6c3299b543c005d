"""Arguments of `load_dataset` that cannot be followed are refused in a sentence that names the domain."""

import pytest

from ultrafuser.row_files import load


@pytest.mark.parametrize("arguments", [{"path": ""}, {"path": 5}, {"path": "json", "data_files": [[]]}], ids=str)
def test_arguments_that_load_dataset_trips_over_are_refused_in_a_sentence(arguments):
    with pytest.raises((ValueError, OSError), match=r"The rows of domain 'code', .* cannot be read"):
        load(arguments, "code")


@pytest.mark.parametrize(
    "arguments",
    [{"path": "json", "data_files": "[" * 100_000}, {"path": "x" * 5000}, {"path": "a", "b": [["*" * 5000]]}],
)
def test_names_that_are_too_long_to_look_for_are_refused_at_once(arguments):
    with pytest.raises(ValueError, match="at most 4096 characters, but the arguments for domain 'code'"):
        load(arguments, "code")


def test_a_folder_of_too_many_files_is_not_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr("ultrafuser.row_files.MOST_FILES", 3)
    for n in range(4):
        (tmp_path / f"{n}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="holds up to 3 files.*domain 'code' holds more"):
        load({"path": str(tmp_path)}, "code")
    (tmp_path / "3.jsonl").unlink()
    assert load({"path": str(tmp_path)}, "code").num_rows == 3


def test_what_load_dataset_says_is_said_of_a_domain(tmp_path):
    file = tmp_path / "code.csv"
    file.write_text("a,b\n1\n")
    arguments = {"path": "csv", "data_files": str(file), "split": "nowhere"}
    with pytest.raises(ValueError, match=r"The rows of domain 'code', .*code\.csv.* cannot be read"):
        load(arguments, "code")
    with pytest.raises(ValueError, match="Domain 'code' must be .* got a DatasetDict of"):
        load({**arguments, "split": None}, "code")
