"""The answers that are judged: those of a folder, and questions of the Hub's sets."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.support.conversations import CHAT_TEMPLATE
from tests.support.judge_server import ROWS, Server
from tests.support.tiny import tokenizer
from ultrafuser.evaluation import judgements
from ultrafuser.evaluation.questions import Question, load_questions


@pytest.fixture
def serve():
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def run(questions, out, judge, answerer=None, **settings):
    """Judges the answers of an endpoint that says, by default, how many messages it has read."""
    settings = {"method": "grading", **settings}
    return judgements.run(answerer or judge, questions=str(questions), judge=judge, out=out, **settings)


def answers_and(verdict):
    """A server's script: answers questions with their number of messages, and judges with `verdict(prompt)`."""

    def reply(messages):
        first = messages[0]["content"]
        return verdict(first) if first.startswith(("You compare", "You grade")) else f"after {len(messages)}"

    return reply


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"id": "a", "turns": ["x"]', "line 2: no JSON"),
        ('["a"]', "line 2: an object was expected, but got list"),
        ('{"id": "a", "turn": ["x"]}', r"line 2: `turns` missing, it has \['id', 'turn'\]"),
        ('{"category": "a"}', "line 2: `id` and `turns` missing"),
        ('{"id": "a", "turns": []}', r"line 2: `turns` must be a list of one or more texts, but is \[\]"),
        ('{"id": "a", "turns": ["x", " "]}', "line 2: `turns` must be"),
        ('{"id": "a", "turns": ["x"], "reference": "y"}', "line 2: `reference` must be .* but is 'y'"),
        ('{"id": "a", "turns": ["x"], "reference": ["y", "z"]}', "line 2: `reference` must be"),
        ('{"id": "a", "turns": ["x"], "category": 3}', "line 2: `category` must be text, but is 3"),
        ('{"id": "sum", "turns": ["x"]}', "line 2: `id` 'sum' is already that of line 1"),
    ],
)
def test_a_malformed_row_is_named_before_anything_is_asked(line, fault, serve, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    server = serve()
    with pytest.raises(ValueError, match=rf"in '{path}' {fault}"):
        run(path, tmp_path / "out", server.endpoint())
    assert server.requests == []


@pytest.fixture
def folder(fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.mark.e2e
def test_a_folders_answers_are_what_it_generates_alone(fused, folder, serve, questions, tmp_path):
    server = serve(answers_and(lambda prompt: "[[7]]"))
    settings = {"max_new_tokens": 12, "batch_size": 2}
    run(questions, tmp_path / "out", server.endpoint(), folder, **settings)
    _, *lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    said = {(row["id"], row["part"]): row["answer"] for row in map(json.loads, lines)}
    words = AutoTokenizer.from_pretrained(folder)
    for row in ROWS:
        messages = []
        for turn, text in enumerate(row["turns"]):
            messages.append({"role": "user", "content": text})
            ids = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            output = fused.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            answer = words.decode(output, skip_special_tokens=True).strip()
            assert said[str(row["id"]), turn] == answer
            messages.append({"role": "assistant", "content": answer})

    # one line is lost, and only that answer is generated again
    journal = tmp_path / "out" / "answers.jsonl"
    before = journal.read_text()
    journal.write_text("".join(before.splitlines(keepends=True)[:-1]))
    asked = len(server.requests)
    run(questions, tmp_path / "out", server.endpoint(), folder, **settings)
    assert journal.read_text() == before
    assert len(server.requests) == asked + 1


# the context is of 256 tokens, and the template takes 18
@pytest.mark.e2e
@pytest.mark.parametrize(("length", "has_answer"), [(300, False), (230, True)])
def test_a_prompt_that_fills_the_context_is_cut_and_takes_no_room_from_others(
    length, has_answer, folder, serve, tmp_path
):
    short = '{"id": "short", "turns": ["x"]}\n'
    answers = []
    for name, rows in {
        "both": json.dumps({"id": "long", "turns": ["x" * length]}) + "\n" + short,
        "one": short,
    }.items():
        (tmp_path / name).write_text(rows)
        found = run(tmp_path / name, tmp_path / f"out-{name}", serve().endpoint(), folder, max_new_tokens=9)
        lines = (tmp_path / f"out-{name}" / "answers.jsonl").read_text().splitlines()[1:]
        answers.append({row["id"]: (row["answer"], row["finish"]) for row in map(json.loads, lines)})
        assert found["answers_cut"] == [finish for _, finish in answers[-1].values()].count("length")
    assert answers[0]["short"] == answers[1]["short"]
    assert (bool(answers[0]["long"][0]), answers[0]["long"][1]) == (has_answer, "length")


def test_a_folder_that_was_saved_anew_is_another_model(fused, folder, serve, questions, tmp_path):
    server = serve()
    run(questions, tmp_path / "out", server.endpoint(), folder, max_new_tokens=2)
    fused.save_pretrained(folder)
    with pytest.raises(ValueError, match="was begun with others .*weights"):
        run(questions, tmp_path / "out", server.endpoint(), folder, max_new_tokens=2)


def test_a_folder_without_weights_or_template_is_refused(fused, serve, questions, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none. Point to the folder"):
        run(questions, tmp_path / "out", serve().endpoint(), tmp_path)
    fused.save_pretrained(tmp_path / "bare")
    tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="put in the model's chat template, but the tokenizer in .* has none"):
        run(questions, tmp_path / "out", serve().endpoint(), tmp_path / "bare")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache with both data sets in their own layout, as a download leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def snapshot(repository, commit):
        folder = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        return folder / "snapshots" / commit

    alpaca = snapshot("tatsu-lab/alpaca_eval", "a" * 40)
    rows = [{"dataset": "koala", "instruction": "Say hello.", "output": "Hello!", "generator": "text_davinci_003"}]
    (alpaca / "alpaca_eval.json").write_text(json.dumps(rows))
    bench = snapshot("HuggingFaceH4/mt_bench_prompts", "b" * 40)
    (bench / "data").mkdir()
    rows = {
        "category": ["math", "writing"],
        "prompt": [["2+2?", "And 3 more?"], ["A poem.", "Shorter."]],
        "reference": [["4", "7"], []],
        "prompt_id": [81, 82],
    }
    pq.write_table(pa.table(rows), bench / "data" / "train-00000-of-00001-67c6.parquet")


@pytest.mark.usefixtures("hub")
def test_sets_of_the_hub_are_read_in_their_own_layout_with_their_commit():
    found, source = load_questions("alpaca_eval")
    assert found == [Question("0", ["Say hello."], "koala", ["Hello!"])]
    assert source == "tatsu-lab/alpaca_eval@" + "a" * 40
    found, source = load_questions("mt_bench", revision="b" * 40)
    assert found[0] == Question("81", ["2+2?", "And 3 more?"], "math", ["4", "7"])
    assert found[1] == Question("82", ["A poem.", "Shorter."], "writing", [])
    assert source == "HuggingFaceH4/mt_bench_prompts@" + "b" * 40
    with pytest.raises(OSError, match=r"'mt_bench' could not be read .* \(revision 'c1'\)"):
        load_questions("mt_bench", revision="c1")
    with pytest.raises(FileNotFoundError, match=r"one of \['alpaca_eval', .*but 'mt-bench' is neither"):
        load_questions("mt-bench")
