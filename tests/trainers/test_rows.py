"""Rows of training data: forms that differ between domains, and rows that cannot be read, in memory and in files."""

import gzip
import json
import logging

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import PAPER
from tests.support.tiny import specialist, tokenizer
from trainers import GateStageConfig, GateTrainer
from trainers.domains import by_domain
from trainers.responses import marks_responses
from ultrafuser.cli.app import app
from ultrafuser.evaluation.held_out_files import read_domains
from ultrafuser.row_files import load
from ultrafuser.source_names import load_arguments


TEMPLATE = (
    "{% if tools %}{{ tools|length }} tools {% endif %}{% if shout is defined %}!{% endif %}"
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}:"
    "{% generation %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments|tojson }}{% endfor %}"
    "{% endgeneration %}; {% endfor %}"
)

MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}; {% endfor %}"
)


def turns(*said, **more):
    return [{"role": r, "content": c, **more} for r, c in zip(("user", "assistant") * 2, said, strict=False)]


def calls(arguments):
    return [
        *turns("hi"),
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": arguments}}]},
    ]


FORMS = {
    "text": {"text": "some text"},
    "chat": {"messages": turns("hi", "yes")},
    "named": {"messages": turns("hi", "yes", name="x")},
    "calls": {"messages": calls({"x": 1}), "tools": [{"name": "f"}]},
    "tools as text": {"messages": turns("hi", "yes"), "tools": '[{"name": "f"}]'},
    "template settings": {"messages": turns("hi", "yes"), "chat_template_kwargs": {"shout": True}},
    "strings": {"prompt": "q", "completion": " a"},
    "turns": {"prompt": turns("q"), "completion": [{"role": "assistant", "content": "a"}]},
    "old chat": {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}]},
    "tokens": {"input_ids": [5, 6, 7, 8]},
    "masked tokens": {"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 0, 1, 1]},
    "labels": {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    "other columns": {"text": "more text", "id": 7, "meta": {"of": ["a"]}},
}

SOME = Dataset.from_list([FORMS["text"]] * 4)


@pytest.fixture(scope="module")
def fused():
    set_seed(0)
    parts = {name: specialist(layers=1, hidden_size=16) for name in ("text", "code")}
    return UltraFuserForCausalLM.from_specialists(parts)


def stage(fused, data, folder, *, chat_template=TEMPLATE, **settings):
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, **PAPER}
    settings = {"examples_per_domain": 2, "per_device_train_batch_size": 2, **quiet, **settings}
    words = tokenizer(chat_template=chat_template)
    return GateTrainer(fused, GateStageConfig(str(folder), **settings), data, processing_class=words)


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines that were printed."""
    monkeypatch.setattr(logging.getLogger("modeling_ultrafuser"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("modeling_ultrafuser")]


# ---------------------------------------------------------------------------------- forms


@pytest.mark.e2e
def test_domains_of_every_form_train_together_and_each_as_alone(fused, tmp_path):
    data = {name: Dataset.from_list([row] * 4) for name, row in FORMS.items()}
    trainer = stage(fused, data, tmp_path)
    trainer.train()
    rows = trainer.train_dataset
    for name in FORMS:
        alone = stage(fused, {name: data[name]}, tmp_path).train_dataset
        together = rows.filter(lambda row, name=name: row["domain"] == name)
        assert together["input_ids"][:] == alone["input_ids"][:], name
        assert together["labels"][:] == alone["labels"][:], name

    def read(name):
        row = next(row for row in rows if row["domain"] == name)
        return trainer.processing_class.decode(row["input_ids"]), row["labels"]

    assert read("named")[0] == "user x:hi; assistant x:yes; "
    assert read("calls")[0] == '1 tools user:hi; assistant:{"x": 1}; '
    assert read("template settings")[0].startswith("!user")
    # prompts are not learned, whatever the form of the first domain
    assert read("strings")[1][0] == -100
    assert read("masked tokens")[1] == [-100, -100, 7, 8]
    assert -100 not in read("text")[1]


def test_domains_in_one_column_are_read_in_their_own_forms(fused, tmp_path):
    parts = [Dataset.from_list([FORMS[n]] * 4).add_column("domain", [n] * 4) for n in ("text", "chat", "strings")]
    trainer = stage(fused, concatenate_datasets(parts), tmp_path)
    assert trainer.domains == ["chat", "strings", "text"]
    trainer.train()


def test_only_assistants_are_learned_in_a_mix_whose_first_domain_is_text(fused, tmp_path):
    data = {name: Dataset.from_list([FORMS[name]] * 4) for name in ("text", "chat")}
    rows = stage(fused, data, tmp_path, assistant_only_loss=True).train_dataset
    labels = {row["domain"]: row["labels"] for row in rows}
    assert -100 in labels["chat"]
    assert -100 not in labels["text"]


@pytest.mark.parametrize("form", ["chat", "old chat"])
def test_of_conversations_only_the_assistant_is_learned_where_the_template_marks_it(form, fused, tmp_path, lines):
    data = {"text": SOME, "chat": Dataset.from_list([FORMS[form]] * 4)}
    rows = {row["domain"]: row for row in stage(fused, data, tmp_path, chat_template=MARKED).train_dataset}
    learned = [i for i in rows["chat"]["labels"] if i != -100]
    assert tokenizer().decode(learned) == "yes"
    assert rows["text"]["labels"] == rows["text"]["input_ids"]
    assert not any("turns" in line for line in lines())
    all_turns = stage(fused, data, tmp_path, chat_template=MARKED, assistant_only_loss=False).train_dataset
    assert all(-100 not in row["labels"] for row in all_turns)


def test_a_template_without_marks_is_named_once_and_all_turns_are_learned(fused, tmp_path, lines):
    data = {"text": SOME, "chat": Dataset.from_list([FORMS["chat"]] * 4)}
    plain = "{% for m in messages %}{{ m.role }}:{{ m.content }}; {% endfor %}"
    rows = stage(fused, data, tmp_path, chat_template=plain).train_dataset
    assert all(-100 not in row["labels"] for row in rows)
    assert sum("All turns of the conversations are learned" in line for line in lines()) == 1
    stage(fused, data, tmp_path, chat_template=plain, assistant_only_loss=False)
    stage(fused, {"text": SOME}, tmp_path, chat_template=plain)
    assert sum("All turns of the conversations are learned" in line for line in lines()) == 1


def test_a_template_that_trl_knows_is_marked():
    from trl.chat_template_utils import qwen2_5_chat_template

    assert marks_responses(tokenizer(chat_template=qwen2_5_chat_template))
    assert not marks_responses(tokenizer())


def test_evaluating_on_a_domain_reads_that_domain_alone(fused, tmp_path):
    data = {name: Dataset.from_list([FORMS[name]] * 4) for name in ("text", "chat")}
    trainer = stage(fused, data, tmp_path)
    prepared = trainer._prepare_dataset(data["text"], trainer.processing_class, trainer.args, False, None, "eval")
    assert len(prepared) == 4


# ---------------------------------------------------------------------------------- what is no set of rows


ODD = {
    "an empty domain": ({"text": SOME, "code": SOME.select([])}, "domain 'code' has no rows"),
    "nothing": ({}, "there are none"),
    "all splits": ({"text": SOME, "code": DatasetDict(train=SOME, test=SOME)}, r"Domain 'code' .*\['train', 'test'\]"),
    "all splits of all": (
        DatasetDict(train=SOME, test=SOME),
        r"`train_dataset` .* DatasetDict of \['train', 'test'\]",
    ),
    "a list": ({"text": [{"text": "a"}] * 4, "code": SOME}, "Domain 'text' .* got a list"),
    "a list for all": ([{"text": "a", "domain": "text"}], "`train_dataset` .* got a list"),
    "a stream": ({"text": SOME, "code": SOME.to_iterable_dataset()}, "Domain 'code' .* got an IterableDataset"),
    "a nameless domain": ({" ": SOME}, "one of .* is ' '"),
    "a row without a domain": (SOME.add_column("domain", ["a", "a", None, "b"]), "Row 3 .* the domain None"),
    "a row of a blank domain": (SOME.add_column("domain", ["a", " ", "b", "b"]), "Row 2 .* the domain ' '"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_set_of_domains_is_refused_by_name(case):
    data, words = ODD[case]
    with pytest.raises(ValueError, match=words):
        by_domain(data)


BAD = {
    "null": ({"text": None}, "no `text`"),
    "null completion": ({"prompt": "q", "completion": None}, "no `completion`"),
    "null messages": ({"messages": None}, "no `messages`"),
    "no turns": ({"messages": []}, "where a list of turns"),
    "a null turn": ({"messages": [None]}, "turn 1, None"),
    "a null role": ({"messages": [{"role": None, "content": "a"}]}, "turn 1.*no `role`"),
    "null content": ({"messages": [*turns("a"), {"role": "assistant", "content": None}]}, "turn 2.*no `content`"),
    "null value": ({"conversations": [{"from": "user", "value": None}]}, "turn 1.*no `value`"),
    "no role": ({"messages": [{"content": "a"}]}, "turn 1.*no `role`"),
    "text for turns": ({"messages": "hi"}, "where a list of turns"),
    "turns beside text": ({"prompt": turns("q"), "completion": "a"}, "`prompt` as list and `completion` as str"),
    "a number": ({"text": 7}, "7, which is no text"),
    "half a character": ({"text": "a\ud83d"}, "half of a surrogate pair"),
    "null settings": ({"messages": turns("a", "b"), "chat_template_kwargs": 3}, "3 in `chat_template_kwargs`"),
    "null token": ({"input_ids": [1, None]}, "list of token ids"),
    "no tokens": ({"input_ids": []}, "list of token ids"),
    "a foreign token": ({"input_ids": [5, 99]}, "the id 99, but the vocabulary has 99"),
    "a foreign label": ({"input_ids": [5, 6], "labels": [-100, 99]}, "`labels` 99, which is neither"),
    "a negative label": ({"input_ids": [5, 6], "labels": [-1, 6]}, "`labels` -1, which is neither"),
    "fewer labels": ({"input_ids": [5, 6], "labels": [5]}, "1 numbers in `labels` and 2 in `input_ids`"),
}
# what a table of columns of one type each cannot hold beside good rows
ONLY_IN_FILES = ("text for turns", "turns beside text", "a number", "half a character")
GOOD = {"text": "text", "prompt": "strings", "messages": "chat", "conversations": "old chat", "input_ids": "tokens"}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_domain(case, fused, tmp_path):
    row, words = BAD[case]
    good = {**FORMS[GOOD[next(iter(row))]], **({"labels": [5, 6, 7, 8]} if "labels" in row else {})}
    file = tmp_path / "code.jsonl"
    file.write_text("\n".join(map(json.dumps, [good, good, row])))
    if case not in ("a foreign token", "a foreign label"):
        with pytest.raises(ValueError, match=rf"code\.jsonl, line 3: this row of domain 'code' has.*{words}"):
            load(load_arguments(str(file)), "code")
    if case not in ONLY_IN_FILES and "chat_template_kwargs" not in row:
        data = {"text": SOME, "code": Dataset.from_list([good, good, row])}
        with pytest.raises(ValueError, match=rf"^Row 3 of domain 'code' has.*{words}"):
            stage(fused, data, tmp_path)


def test_evaluating_on_no_rows_is_refused(fused, tmp_path):
    trainer = stage(fused, {"text": SOME}, tmp_path)
    with pytest.raises(ValueError, match="`eval` dataset must be a `datasets.Dataset`, but got a list"):
        trainer._prepare_dataset([{"text": "a"}], trainer.processing_class, trainer.args, False, None, "eval")
    with pytest.raises(ValueError, match="There are no rows in eval"):
        trainer._prepare_dataset(SOME.select([]), trainer.processing_class, trainer.args, False, None, "eval")


def test_columns_of_no_form_and_images_are_refused(fused, tmp_path):
    for row in ({"question": "a"}, {"messages": turns("a", "b"), "image": "x.png"}):
        with pytest.raises(ValueError, match=f"those of domain 'code' have .*{[*row][-1]}"):
            stage(fused, {"text": SOME, "code": Dataset.from_list([row])}, tmp_path)


def test_unprepared_rows_of_two_types_are_refused_by_column(fused, tmp_path):
    data = {name: Dataset.from_list([FORMS[name]] * 4) for name in ("chat", "named")}
    with pytest.raises(ValueError, match="`messages` differs: .* in domain 'chat', .* in domain 'named'"):
        stage(fused, data, tmp_path, dataset_kwargs={"skip_prepare_dataset": True})


# ---------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_cut_or_hold_nothing_to_learn_are_counted_and_told(packing, fused, tmp_path, lines, monkeypatch):
    monkeypatch.setattr("trainers.stage_gate.LITTLE", 0)
    rows = [{"prompt": "q" * n, "completion": "abc"} for n in (2, 2, 8, 20, 20, 20)]
    data = {"text": SOME, "code": Dataset.from_list(rows)}
    trainer = stage(fused, data, tmp_path, max_length=10, packing=packing)
    assert lines() == [
        "Of 6 rows of domain 'code', 4 are longer than `max_length=10` and are cut and 3 hold nothing to learn, because all "
        "that is left of them is prompt or a single token."
    ]
    if not packing:
        assert trainer.sizes.tolist() == [3, 4]


# ---------------------------------------------------------------------------------- files


def written(path, *rows, name="code.jsonl"):
    path = path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_a_file_are_read_as_they_stand_in_it(tmp_path):
    rows = [FORMS["calls"], {"messages": calls({"y": [1, "a"]})}, FORMS["named"], FORMS["template settings"]]
    found = load(load_arguments(str(written(tmp_path, *rows))), "code")
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    assert found["tools"][:] == [[{"name": "f"}], None, None, None]
    assert found["chat_template_kwargs"][:] == [{}, {}, {}, {"shout": True}]


@pytest.mark.grid
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_any_form_trains(form, fused, tmp_path):
    rows = load(load_arguments(str(written(tmp_path, *[FORMS[form]] * 4))), "code")
    memory = stage(fused, {"code": Dataset.from_list([FORMS[form]] * 4)}, tmp_path).train_dataset
    assert stage(fused, {"code": rows}, tmp_path).train_dataset["labels"][:] == memory["labels"][:]


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    first = load(load_arguments(str(written(tmp_path, {"text": "one"}))), "code")["text"][:]
    again = load(load_arguments(str(written(tmp_path, {"text": "twice"}))), "code")["text"][:]
    assert (first, again) == (["one"], ["twice"])


def test_domains_of_one_file_are_in_forms_of_their_own(fused, tmp_path):
    file = written(tmp_path, *({**FORMS[n], "domain": n} for n in ("text", "chat", "strings", "text")))
    found = load(load_arguments(str(file)))
    assert {name: len(rows) for name, rows in found.items()} == {"text": 2, "chat": 1, "strings": 1}
    stage(fused, found, tmp_path).train()


def raw(path, content, name="code.jsonl"):
    (path / name).write_bytes(content)
    return path / name


GOOD_LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.jsonl", b"\xef\xbb\xbf" + GOOD_LINE * 2),  # a byte order mark
        ("code.jsonl", b"\n" + GOOD_LINE + b"  \r\n\n" + GOOD_LINE.rstrip()),  # blank lines
        ("code.jsonl.gz", gzip.compress(GOOD_LINE * 2)),
        ("code.json", b'[\n {"text": "a"},\n {"text": "a"}\n]\n'),
    ],
    ids=["a byte order mark", "blank lines", "zipped", "a list"],
)
def test_files_are_read_whatever_stands_around_their_rows(name, content, tmp_path):
    assert load(load_arguments(str(raw(tmp_path, content, name))), "code")["text"][:] == ["a", "a"]


BROKEN = {
    "a cut line": (GOOD_LINE + b'{"text": "b', r"line 2: this row of domain 'code' is no JSON"),
    "no object": (GOOD_LINE + b"7\n", r"line 2: this row of domain 'code' is no object: 7"),
    "a column twice": (GOOD_LINE + b'{"text": "a", "text": "b"}\n', r"line 2: .* has `text` twice"),
    "latin-1": (GOOD_LINE + "{'text': 'é'}".encode("latin-1"), r"line 2: domain 'code' is not UTF-8"),
    "utf-16": (GOOD_LINE.decode().encode("utf-16"), r"line 1: domain 'code' is not UTF-8"),
    "empty": (b"", "no row is in it, but domain 'code' needs some"),
    "blank": (b"\n\n", "no row is in it, but domain 'code' needs some"),
    "several forms": (b'{"prompt": "q", "completion": "a"}\n' + GOOD_LINE, r"line 2: .* but `text`, where the form"),
    "text and turns": (
        b'{"prompt": "q", "completion": "a"}\n'
        b'{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}\n',
        r"line 2: .* as list, and the rows before it as str",
    ),
    "no form": (b'{"question": "q"}\n', r"line 1: this row of domain 'code' has \['question'\], where rows have"),
    "cut while zipped": (gzip.compress(GOOD_LINE * 9)[:-9], "cannot be read beyond line"),
    "too deep": (b'{"text": ' + b"[" * 100_000, r"line 1: this row of domain 'code'"),
    "a list cut": (b'[{"text": "a"},\n', r"this row of domain 'code' is no JSON"),
    "a list of others": (b'[{"text": "a"}, 7]', r"row 2: this row of domain 'code' is no object: 7"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_domain_and_line(case, tmp_path):
    content, words = BROKEN[case]
    file = raw(tmp_path, content)
    with pytest.raises((ValueError, OSError), match=rf"code\.jsonl.*{words}") as error:
        load(load_arguments(str(file)), "code")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", [c for c in BROKEN if c not in ("several forms", "text and turns")])
def test_evaluating_says_the_same_of_a_file(case, tmp_path):
    content, words = BROKEN[case]
    with pytest.raises((ValueError, OSError), match=rf"code\.jsonl.*{words}"):
        read_domains({"code": str(raw(tmp_path, content))}, tokenizer(), examples=99)


def test_a_row_of_a_file_without_a_domain_is_named(tmp_path):
    file = written(tmp_path, {"text": "a", "domain": "text"}, {"text": "b"})
    with pytest.raises(ValueError, match=r"code\.jsonl, line 2: this row of the data has the domain None"):
        load(load_arguments(str(file)))


def test_a_missing_file_is_named_with_its_domain(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*gone\.jsonl' for domain 'code'"):
        load(load_arguments(str(tmp_path / "gone.jsonl")), "code")


@pytest.mark.parametrize("command", ["train", "gates", "evaluate"])
def test_commands_end_with_one_sentence_and_2(command, fused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fused.save_pretrained("fused")
    tokenizer(chat_template=TEMPLATE).save_pretrained("fused")
    good = written(tmp_path, *[FORMS["strings"]] * 4, name="text.jsonl")
    bad = written(tmp_path, FORMS["strings"], {"prompt": "a", "completion": None})
    data = ["--data", f"text={good}", "--data", f"code={bad}", "--out", "out"]
    own = {"train": ["--stage", "gate", "--model", "fused"], "gates": ["--model", "fused", "--gate", "linear"]}
    shown = CliRunner().invoke(app, [command, *own.get(command, ["fused"]), *data])
    assert shown.exit_code == 2
    assert "code.jsonl, line 2: this row of domain 'code' has no `completion`" in shown.output
    assert "Traceback" not in shown.output
