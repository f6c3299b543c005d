"""Sets taken in: rows in the very layout of the public sets, from files, become records of one schema."""

import json
import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from ultrafuser.cli.app import app
from ultrafuser.data.sources import KEYS, SOURCES, MalformedRow, raw_rows, take_in, to_record, write_records


# first rows as the sets have them: name -> (file, rows, messages of the first record)
LAYOUTS = {
    "ultrachat-200k": (
        "train_sft-00000-of-00003.parquet",
        [
            {
                "prompt": "Who wrote Emma?",
                "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
                "messages": [
                    {"content": "Who wrote Emma?", "role": "user"},
                    {"content": "Jane Austen.", "role": "assistant"},
                    {"content": "When?", "role": "user"},
                    {"content": "In 1815.", "role": "assistant"},
                ],
            }
        ],
        ["user: Who wrote Emma?", "assistant: Jane Austen.", "user: When?", "assistant: In 1815."],
    ),
    "evol-instruct-code": (
        "EvolInstruct-Code-80k.json",
        [{"instruction": "Add two numbers.", "output": "a + b"}],
        ["user: Add two numbers.", "assistant: a + b"],
    ),
    "mathinstruct": (
        "MathInstruct.json",
        [{"source": "data/CoT/gsm_rft.json", "output": "It is 4.", "instruction": "What is 2 + 2?"}],
        ["user: What is 2 + 2?", "assistant: It is 4."],
    ),
    "sharegpt": (
        "ShareGPT_V3_unfiltered_cleaned_split.json",
        [
            {
                "id": "i6IyJda_0",
                "conversations": [
                    {"from": "gpt", "value": "what was cut off"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello."},
                    {"from": "human", "value": "what was never answered"},
                ],
            }
        ],
        ["user: Hi", "assistant: Hello."],
    ),
    "p3": (
        "0000.parquet",
        [
            {
                "inputs": [3, 4],
                "inputs_pretokenized": "Is it so?",
                "targets": [5, 1],
                "targets_pretokenized": "\nYes",
            }
        ],
        ["user: Is it so?", "assistant: \nYes"],
    ),
    "medinstruct": (
        "MedInstruct-52k.json",
        [
            {"instruction": "Classify this.", "input": "A cough.", "output": "Respiratory."},
            {"instruction": "Name a bone.", "input": "<noinput>", "output": "Femur."},
        ],
        ["user: Classify this.\n\nA cough.", "assistant: Respiratory."],
    ),
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def said(record):
    return [f"{message['role']}: {message['content']}" for message in record["messages"]]


def test_every_source_has_a_layout_here():
    assert SOURCES.keys() == LAYOUTS.keys()


@pytest.mark.filterwarnings("ignore:The licence of 'medinstruct'")
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_a_public_set_become_records(name, tmp_path):
    file, rows, expected = LAYOUTS[name]
    records = list(take_in(name, files=write(tmp_path / file, rows)))
    assert len(records) == len(rows)
    assert said(records[0]) == expected
    assert set(records[0]) == set(KEYS)
    source = SOURCES[name]
    assert (records[0]["domain"], records[0]["source"]) == (source.domain, name)
    assert records[0]["licence"] == (source.licence or "unknown")


def test_an_input_that_is_none_is_not_put_under_the_prompt(tmp_path):
    file, rows, _ = LAYOUTS["medinstruct"]
    with pytest.warns(UserWarning, match="medinstruct"):
        records = list(take_in("medinstruct", files=write(tmp_path / file, rows)))
    assert said(records[1]) == ["user: Name a bone.", "assistant: Femur."]


def test_topics_come_from_the_column_that_holds_them(tmp_path):
    file, rows, _ = LAYOUTS["mathinstruct"]
    assert next(take_in("mathinstruct", files=write(tmp_path / file, rows)))["topic"] == "data/CoT/gsm_rft.json"


def test_a_folder_of_the_hubs_layout_is_read_with_a_mapping_and_its_cards_licence(tmp_path):
    rows = [{"question": "1 + 1?", "solution": "2", "subject": "sums"}]
    write(tmp_path / "set" / "test.jsonl", rows)
    (tmp_path / "set" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A set\n")
    columns = {"prompt": "question", "answer": "solution", "topic": "subject"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = list(take_in(str(tmp_path / "set"), domain="math", columns=columns, split="test"))
    assert said(records[0]) == ["user: 1 + 1?", "assistant: 2"]
    assert (records[0]["topic"], records[0]["licence"]) == ("sums", "cc-by-4.0")


def test_records_that_were_written_come_back_the_same(tmp_path):
    record = to_record(LAYOUTS["ultrachat-200k"][1][0], {"messages": "messages"}, domain="text", licence="mit")
    record |= {"topic": "Books", "source": "ultrachat-200k", "subtopic": "Novels", "kind": "seed", "skills": ["dates"]}
    assert write_records([record] * 3, tmp_path / "records.jsonl") == 3
    assert list(take_in(str(tmp_path / "records.jsonl"))) == [record] * 3
    assert not list(tmp_path.glob("*.part"))
    Dataset.from_list([record] * 3).save_to_disk(tmp_path / "saved")
    assert list(take_in(str(tmp_path / "saved"), licence="mit")) == [record] * 3
    # and in the folder of a made set
    (tmp_path / "saved").rename(Path(write(tmp_path / "made" / "text.jsonl", [{"a": 1}])).with_name("dataset"))
    assert list(take_in(str(tmp_path / "made"), licence="mit")) == [record] * 3


def test_lines_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "records.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "licence": "mit"}
    path.write_text(json.dumps(row) + "\nno JSON\n")
    assert said(next(take_in(str(path), domain="text"))) == ["user: a", "assistant: b"]


def test_an_unknown_licence_is_named_once(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "records.jsonl", [row, row])
    with pytest.warns(UserWarning, match=r"licence of '.*records\.jsonl' is unknown") as seen:
        records = list(take_in(path, domain="text"))
    assert [record["licence"] for record in records] == ["unknown"] * 2
    assert len(seen) == 1


ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "licence": "mit"}


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ("no JSON", "This is no JSON"),
        ('["a"]', "this is a list"),
        ({"text": "a"}, r"Column 'messages' is missing; there are \['text'\]"),
        ({"messages": "a"}, "holds a list, but here a str"),
        ({"messages": []}, "no question with an answer"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "Message 0 is from one of .* but here from 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "Message 0 has no text"),
        ({"messages": [ROW["messages"][0], *ROW["messages"]]}, "take turns, but message 1"),
        ({**ROW, "domain": ""}, "belongs to a domain"),
    ],
)
def test_a_malformed_row_is_named_by_its_line_and_what_is_missing(tmp_path, row, missing):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({**ROW, "domain": "text"})
    bad = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(MalformedRow, match=rf"rows\.jsonl, line 3: .*{missing}"):
        list(take_in(str(path)))
    left_out = []
    assert len(list(take_in(str(path), on_malformed=left_out.append))) == 2
    assert len(left_out) == 1


@pytest.mark.parametrize(
    "row", [{"question": "a"}, {"question": "a", "answer": None}, {"question": "a", "answer": " "}]
)
def test_a_malformed_row_of_a_table_is_named_by_its_number(tmp_path, row):
    path = write(tmp_path / "rows.json", [{"question": "a", "answer": "b"}, row])
    with pytest.raises(MalformedRow, match=r"rows\.json, row 2: Column 'answer' is empty"):
        list(take_in(path, domain="d", licence="mit", columns={"prompt": "question", "answer": "answer"}))


def test_mappings_and_endings_that_are_unknown_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'question'"):
        take_in("some/set", columns={"question": "prompt"})
    with pytest.raises(ValueError, match=r"'set\.xml'"):
        next(take_in("mathinstruct", files="set.xml"))
    with pytest.raises(MalformedRow, match="`prompt` and `answer`"):
        to_record({"question": "a"}, {"prompt": "question"})


def test_rows_of_an_evaluation_set_come_as_they_are(tmp_path):
    rows = [{"question": "a", "choices": ["b", "c"]}]
    assert list(raw_rows(write(tmp_path / "exam.jsonl", rows))) == rows
    assert list(raw_rows(write(tmp_path / "exam.json", rows))) == rows


# the command


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_the_command_takes_in_counts_and_overwrites_nothing(tmp_path):
    rows = [{"q": f"{i}?", "a": "yes"} for i in range(5)] + [{"q": "none"}]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    mapping = ("--column", "prompt=q", "--column", "answer=a", "--domain", "text", "--licence", "mit", "--out", out)
    refused = run("take-in", path, *mapping)
    assert refused.exit_code == 2
    assert "line 6: Column 'a' is missing" in refused.output
    assert not out.exists()
    assert "5 records, 1 malformed" in run("take-in", path, *mapping, "--skip-malformed").output
    again = run("take-in", path, *mapping, "--limit", 2)
    assert again.exit_code == 2
    assert "out.jsonl' is there" in again.output
    assert "2 records, 0 malformed" in run("take-in", path, *mapping, "--limit", 2, "--overwrite").output
    assert len(out.read_text().splitlines()) == 2


def test_the_command_cleans_against_an_evaluation_set(tmp_path):
    exam = "a train leaves the station at noon and arrives in the next town at three"
    texts = [f"{exam}.", "what is 1 + 1?", "name a colour of the rainbow"]
    rows = [
        {
            **ROW,
            "domain": "text",
            "messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "Fine, done."}],
        }
        for t in texts
    ]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "cleaned"
    against = f"exam={write(tmp_path / 'exam.jsonl', [{'question': exam.upper()}])}"
    options = ("--out", out, "--against", against, "--skip", "language", "--processes", 1)
    done = run("clean", path, *options)
    assert done.exit_code == 0, done.output
    assert "contamination" in done.output
    dropped = json.loads((out / "dropped.jsonl").read_text())
    assert (dropped["row"], dropped["filter"]) == (1, "contamination")
    assert len((out / "kept.jsonl").read_text().splitlines()) == 2
    assert "holds a cleaned set" in run("clean", path, *options).output
    assert run("clean", path, *options, "--overwrite", "--style-share", 0.5).exit_code == 0
    assert len((out / "kept.jsonl").read_text().splitlines()) == 1
    assert "together" in run("clean", path, *options, "--ifd-share", 0.5).output


def test_so_many_rows_of_each_configuration_are_taken(tmp_path):
    for name, words in (("birds", ("wren", "crow", "kite")), ("fish", ("cod",))):
        write(tmp_path / name / "train.jsonl", [{"q": "Which?", "a": word} for word in words])
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("birds", "fish"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    options = {"domain": "text", "licence": "mit", "columns": {"prompt": "q", "answer": "a"}}
    records = take_in(str(tmp_path), per_subset=2, **options)
    assert [record["messages"][1]["content"] for record in records] == ["wren", "crow", "cod"]
    with pytest.raises(ValueError, match="at least 1 from each configuration"):
        take_in(str(tmp_path), per_subset=0, **options)
    with pytest.raises(ValueError, match="config='fish'"):
        take_in(str(tmp_path), per_subset=1, config="fish", **options)
