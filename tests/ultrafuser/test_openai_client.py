"""Whatever a teacher, a judged model or a judge sends back: it is recorded or given up, and the rest goes on."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.support.teacher_server import MODEL, TeacherServer, _send, completion, say, try_again_at_once, write_recipe
from ultrafuser import openai_client
from ultrafuser.data.recipe import Teacher as Settings
from ultrafuser.data.recipe import load_recipe
from ultrafuser.data.synthesis_run import make_set
from ultrafuser.data.teacher import Request, Teacher
from ultrafuser.data.teacher_output import LONGEST, LONGEST_ITEM, read_items
from ultrafuser.evaluation import judgements
from ultrafuser.evaluation.answers import AnswerJournal, answer_through
from ultrafuser.evaluation.endpoint import Endpoint, EndpointError
from ultrafuser.evaluation.questions import Question
from ultrafuser.journal import ReplyJournal


ODD_TEXTS = {
    "brackets": "[" * 5000,
    "braces": '{"a":' * 5000,
    "many braces": "{" * 200_000,
    "brackets before a long list": "[" * 900 + "1," * 100_000,
    "half a surrogate pair": 'a\ud800b ["\udfff"]',
    "NUL": '["a\x00b"]\x00',
    "a number without end": "[" + "9" * 10_000 + "]",
    "blank": " \n ",
}
ODD_FIELDS = {
    "content is a list": {"content": ["a"]},
    "content is a number": {"content": 7},
    "content is true": {"content": True},
    "no choices": {"choices": []},
    "choices are a word": {"choices": "x"},
    "message is missing": {"message": None},
}


def odd_body(request, name):
    """A whole body that is odd in one way."""
    if name in ODD_TEXTS:
        return completion(request, ODD_TEXTS[name])
    body = completion(request, "")
    for field, value in ODD_FIELDS[name].items():
        place = {"content": body["choices"][0]["message"], "message": body["choices"][0]}.get(field, body)
        place[field] = value
    return body


class OddServer:
    """Answers requests that hold a word with an odd body, and all others with a good one."""

    def __init__(self, odd, word="QUEER"):
        server = self
        self.odd, self.word, self.count = odd, word, 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.count += 1
                if server.word in json.dumps(request):
                    body = server.odd(request)
                else:
                    body = json.dumps(completion(request, say(request) + "\n[[7]]")).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def as_json(name):
    return lambda request: json.dumps(odd_body(request, name)).encode()


def nested_body(request):
    return b'{"choices": ' + b"[" * 100_000


def usage(**told):
    def body(request):
        return json.dumps({**completion(request, say(request)), "usage": told}).encode()

    return body


def asked(number, odd_at=None):
    words = [f"What is {i} + {i}?" + " QUEER" * (i == odd_at) for i in range(number)]
    return [Request("answers", "math", [{"role": "user", "content": w}], reply_tokens=50) for w in words]


def ask(server, folder, requests, **more):
    settings = {"base_url": server.url, "model": MODEL, "concurrency": 1, "timeout": 5, "retries": 1, **more}
    with ReplyJournal(folder / "journal.jsonl") as journal, Teacher(Settings(**settings), journal) as teacher:
        return [reply and reply.text for reply in teacher.ask(requests)], teacher


@pytest.mark.parametrize("name", [*ODD_TEXTS, *ODD_FIELDS])
def test_one_odd_reply_of_a_teacher_costs_nothing_but_itself(name, tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    with OddServer(as_json(name)) as server:
        first, teacher = ask(server, tmp_path, asked(4, odd_at=1))
        sent = server.count
        again, _ = ask(server, tmp_path, asked(4, odd_at=1))
        assert teacher.stopped is None
        assert first == again
        assert [reply is not None for reply in first] == [True, name in ODD_TEXTS, True, True]
        assert server.count == sent, "what was given up was asked for again"


def test_a_body_of_brackets_without_end_is_given_up(tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    with OddServer(nested_body) as server:
        found, teacher = ask(server, tmp_path, asked(3, odd_at=0))
    assert teacher.stopped is None
    assert [reply is not None for reply in found] == [False, True, True]


def test_a_body_without_end_is_given_up_before_it_fills_the_memory(tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    monkeypatch.setattr(openai_client, "LONGEST_BODY", 1_000_000)
    with OddServer(lambda request: b" " * 1_500_000) as server:
        found, teacher = ask(server, tmp_path, asked(3, odd_at=1))
    assert teacher.stopped is None
    assert [reply is not None for reply in found] == [True, False, True]


def test_a_server_that_never_sends_a_reply_is_stopped_and_nothing_of_it_is_kept(tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    with OddServer(as_json("no choices"), word="What") as server:
        _, teacher = ask(server, tmp_path, asked(40))
        assert "what came is no chat completion" in teacher.stopped
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_a_reply_longer_than_any_is_kept_in_part_and_counts_as_cut_off():
    message = SimpleNamespace(content="a" * 3_000_000)
    choice = SimpleNamespace(message=message, finish_reason="stop")
    text, finish = openai_client.reply_of(SimpleNamespace(choices=[choice]))
    assert (len(text), finish) == (openai_client.LONGEST_TEXT, "length")


@pytest.mark.parametrize("told", [-(10**9), "many", None, True, 1.5, [7], float("nan")])
def test_a_servers_count_of_tokens_is_believed_only_where_it_is_one(told, tmp_path):
    with OddServer(usage(prompt_tokens=told, completion_tokens=told), word="What") as server:
        _, teacher = ask(server, tmp_path, asked(2))
    foreseen = sum(request.prompt_tokens() for request in asked(2))
    assert teacher.spent[0] == foreseen
    assert teacher.spent[1] > 0


@pytest.mark.parametrize("name", [*ODD_TEXTS, "brackets of other kinds", "quotes"])
def test_reading_a_list_takes_no_longer_for_odd_text(name):
    more = {"brackets of other kinds": '[{"a":[' * 60_000, "quotes": '["\\"' * 100_000}
    read_items({**ODD_TEXTS, **more}[name] * 2)


def test_lists_are_read_behind_other_brackets_and_items_have_a_greatest_length():
    chatter = "see [1] and {this} and [[2]]: " * 20
    assert read_items(chatter + '["one", "two"]') == ["one", "two"]
    assert read_items(json.dumps(["one", "x" * (LONGEST_ITEM + 1), "two"])) == ["one", "two"]
    assert read_items(" " * LONGEST + '["too far"]') == []


@pytest.mark.e2e
def test_a_set_is_made_around_odd_replies_and_made_again_without_a_request(tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    odd = iter([*ODD_TEXTS.values()] * 3)
    usual = TeacherServer._reply

    def reply(self, http, body, fault):
        if fault != "empty":
            return usual(self, http, body, fault)
        return _send(http, 200, json.dumps(completion(body, next(odd))).encode())

    monkeypatch.setattr(TeacherServer, "_reply", reply)
    with TeacherServer(faults=(9, "empty")) as server:
        path = write_recipe(tmp_path, server.url, more_rounds=4, budget={})
        report = make_set(load_recipe(path), tmp_path / "set", console=Console(quiet=True))
        sent = len(server.bodies)
        again = make_set(load_recipe(path), tmp_path / "set", console=Console(quiet=True))
    assert report["stopped"] is None
    assert again == report
    assert len(server.bodies) == sent


# ---------------------------------------------------------------------------------- judges and judged models


QUESTIONS = [{"id": str(i), "turns": [f"What is {i}+{i}?" + " QUEER" * (i == 1), "And then?"]} for i in range(3)]


@pytest.mark.grid
@pytest.mark.parametrize("name", [*ODD_TEXTS, *ODD_FIELDS])
@pytest.mark.parametrize("who", ["model", "judge"])
def test_one_odd_answer_or_judgement_is_recorded_and_the_rest_is_judged(who, name, tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    with OddServer(as_json(name)) as odd, OddServer(None, word="(no word)") as good:
        model, judge = (odd, good) if who == "model" else (good, odd)
        ends = {"concurrency": 2, "retries": 0, "timeout": 5}
        given = {
            "questions": str(tmp_path / "q.jsonl"),
            "judge": Endpoint(MODEL, judge.url, **ends),
            "out": tmp_path / "out",
            "method": "grading",
        }
        found = judgements.run(Endpoint(MODEL, model.url, **ends), **given)
        sent = odd.count + good.count
        again = judgements.run(Endpoint(MODEL, model.url, **ends), **given)
        assert again == found
        assert odd.count + good.count == sent
    assert found["score"] == 7
    # both turns hold the word
    assert found["unjudged"] == (2 if who == "judge" else 0)


def test_a_model_that_never_answers_is_told_and_nothing_of_it_is_kept(tmp_path):
    questions = [Question(q["id"], q["turns"]) for q in QUESTIONS]
    with OddServer(as_json("no choices"), word="What") as server, AnswerJournal(tmp_path / "a.jsonl", {}) as journal:
        with pytest.raises(EndpointError, match="no chat completion"):
            asyncio.run(answer_through(Endpoint(MODEL, server.url, retries=0), questions, journal))
        assert journal.rows == {}


# ---------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["journal", "Journal", "JOURNAL", "dataset", "unfinished", "steps", "report", "a" * 101]
)
def test_a_domain_has_no_name_of_a_file_of_the_set(name, tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("\n  text:", f"\n  {name}:"))
    with pytest.raises(ValueError, match="Rename it"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\\\b", ".hidden", "text ", "", "CON.", "a:b", "a\\0b"])
def test_a_domain_has_a_name_that_every_disk_takes(name, tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("\n  text:", f'\n  "{name}":'))
    with pytest.raises(ValueError, match="file's name too"):
        load_recipe(path)


def test_domains_that_differ_in_capitals_alone_are_refused(tmp_path):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("\n  code:", "\n  TEXT:"))
    with pytest.raises(ValueError, match="'text' and 'TEXT' are both there"):
        load_recipe(path)
