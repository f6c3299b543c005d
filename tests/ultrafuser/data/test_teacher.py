"""The teacher and its journal, over real HTTP, with everything that a server does wrong."""

import asyncio
import json
from collections import Counter

import anyio
import pytest

from tests.support.teacher_server import KEY, MODEL, TeacherServer, say, try_again_at_once
from ultrafuser.data.recipe import Budget
from ultrafuser.data.recipe import Teacher as Settings
from ultrafuser.data.teacher import Pace, Request, Teacher
from ultrafuser.journal import ReplyJournal


def questions(number):
    words = [f"What is {i} + {i}?" for i in range(number)]
    return [Request("answers", "math", [{"role": "user", "content": w}], reply_tokens=50) for w in words]


def settings(server, **more):
    return Settings(**{"base_url": server.url, "model": MODEL, "concurrency": 4, "timeout": 5, "retries": 3, **more})


def ask(server, folder, requests, budget=None, **more):
    with (
        ReplyJournal(folder / "journal.jsonl") as journal,
        Teacher(settings(server, **more), journal, budget) as teacher,
    ):
        replies = teacher.ask(requests)
    return [None if reply is None else reply.text for reply in replies], teacher


def expected(server, requests):
    """What the server says to each, by its own script."""
    said = {body["messages"][-1]["content"]: say(body) for body in server.bodies}
    return [said[r.messages[-1]["content"]] for r in requests]


def test_replies_come_in_the_order_of_the_requests_although_they_arrive_in_another(tmp_path):
    with TeacherServer(delay=0.01, faults={0: "429", 2: "500"}) as server:
        replies, _ = ask(server, tmp_path, questions(20))
        arrived = [json.loads(line)["reply"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
        assert replies == expected(server, questions(20)) != arrived
        assert 1 < server.most_at_once <= 4


@pytest.mark.parametrize("fault", ["429", "500", "disconnect", "half a body", "no JSON"])
def test_what_a_server_does_wrong_now_and_then_loses_nothing(fault, tmp_path, monkeypatch):
    try_again_at_once(monkeypatch)
    with TeacherServer(faults=(3, fault)) as server:
        replies, teacher = ask(server, tmp_path, questions(6), retries=8)
        assert replies == expected(server, questions(6))
        assert teacher.stopped is None
        assert len(server.answered) == 6


def test_a_server_that_says_how_long_to_wait_is_not_asked_before(tmp_path, monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    # what the client waits with
    monkeypatch.setattr(anyio, "sleep", sleep)
    with TeacherServer(faults={0: "429", 1: "429"}) as server:
        ask(server, tmp_path, questions(1))
        assert len(server.bodies) == 3
    assert waited == [0.05, 0.05]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "unheard-of"}, "does not know the model 'unheard-of'. Name a model"),
        ({"api_key_variable": "WRONG_KEY"}, "refused the API key, which came from WRONG_KEY"),
        ({"base_url": "http://127.0.0.1:9/v1", "retries": 0}, "could not be reached in one try"),
    ],
)
def test_a_server_that_cannot_serve_is_told_in_words_once(more, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WRONG_KEY", "wrong")
    monkeypatch.setenv("RIGHT_KEY", KEY)
    with TeacherServer(key=KEY) as server:
        replies, teacher = ask(server, tmp_path, questions(50), **{"api_key_variable": "RIGHT_KEY", **more})
        assert replies == [None] * 50
        assert words in teacher.stopped
        assert len(server.bodies) <= 4


def test_a_server_that_goes_down_half_way_stops_the_run_with_what_there_is(tmp_path):
    with TeacherServer(faults=dict.fromkeys(range(10, 100), "500")) as server:
        replies, teacher = ask(server, tmp_path, questions(20), retries=1)
    assert "still fails after 2 tries. It said: Error code: 500" in teacher.stopped
    assert 0 < sum(reply is not None for reply in replies) <= 10


def test_a_slow_server_is_told_in_words(tmp_path):
    with TeacherServer(delay=0.5) as server:
        _, teacher = ask(server, tmp_path, questions(2), timeout=0.05, retries=0)
    assert "did not answer within 0.05 s in one try. Raise `teacher.timeout`" in teacher.stopped


def test_a_request_that_is_refused_for_what_it_says_is_never_made_again(tmp_path):
    with TeacherServer(faults={3: "400"}) as server:
        replies, teacher = ask(server, tmp_path, questions(8), concurrency=1)
        again, _ = ask(server, tmp_path, questions(8), concurrency=1)
        assert replies == again
        assert [i for i, reply in enumerate(replies) if reply is None] == [3]
        assert teacher.stopped is None
        assert len(server.bodies) == 8


def test_a_server_that_refuses_the_very_first_request_is_asked_in_the_wrong_way(tmp_path):
    with TeacherServer(faults=(1, "400")) as server:
        _, teacher = ask(server, tmp_path, questions(50))
        assert f"cannot take a request for {MODEL!r} with" in teacher.stopped
        assert "A server that knows no schemas needs `teacher.structured: none`" in teacher.stopped
        assert len(server.bodies) <= 4


def test_a_key_that_is_not_set_is_missed_before_anything_is_sent(tmp_path):
    with TeacherServer() as server, pytest.raises(ValueError, match="UNSET_KEY is not set. Run `export UNSET_KEY"):
        ask(server, tmp_path, questions(1), api_key_variable="UNSET_KEY")
    assert server.bodies == []


def test_without_a_key_of_its_own_a_server_does_not_get_that_for_openai(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with TeacherServer(key=KEY) as server:
        _, teacher = ask(server, tmp_path, questions(1))
    assert "came from nowhere" in teacher.stopped


@pytest.mark.parametrize("limit", [{"tokens": 1000}, {"money": 0.001}])
def test_the_budget_is_never_overrun_and_raising_it_pays_for_nothing_twice(limit, tmp_path):
    prices = {"price_in": 1.0, "price_out": 1.0, "max_tokens": 100}
    with TeacherServer() as server:
        replies, teacher = ask(server, tmp_path, questions(40), Budget(**limit), **prices)
        some = len(server.bodies)
        assert "Raise `budget." in teacher.stopped
        assert 0 < sum(reply is not None for reply in replies) == some < 40
        # not more than the dearest reply was left over
        assert 1000 - 120 <= sum(teacher.spent) <= 1000
        replies, teacher = ask(server, tmp_path, questions(40), Budget(tokens=100_000), **prices)
        assert teacher.stopped is None
        assert replies == expected(server, questions(40))
        assert set(server.counts().values()) == {1}


def test_the_same_request_twice_is_sent_once_but_another_sample_of_it_again(tmp_path):
    one = questions(1)[0]
    with TeacherServer() as server:
        replies, _ = ask(server, tmp_path, [one, one, one._replace(sample=1)])
    assert len(server.bodies) == 2
    assert replies[0] == replies[1]


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"parameters": {"top_p": 0.9}}, {"max_tokens": 9}])
def test_other_parameters_are_another_request(change, tmp_path):
    with TeacherServer() as server:
        ask(server, tmp_path, questions(1))
        ask(server, tmp_path, questions(1), **change)
    assert len(server.bodies) == 2
    assert server.bodies[0] | (change.get("parameters") or change) == server.bodies[1]


def test_another_address_of_the_same_model_is_the_same_request(tmp_path):
    with TeacherServer() as one, TeacherServer() as two:
        ask(one, tmp_path, questions(3))
        ask(two, tmp_path, questions(3))
    assert (len(one.bodies), len(two.bodies)) == (3, 0)


def entries(number):
    return [{"key": f"k{i}", "reply": f"é{i}", "tokens_in": i, "tokens_out": 1} for i in range(number)]


def test_a_journal_cut_at_any_byte_holds_the_whole_lines_before_the_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    with ReplyJournal(path) as journal:
        for entry in entries(3):
            journal.write(entry)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        with ReplyJournal(path) as journal:
            whole = content[:length].count(b"\n")
            assert len(journal) == whole
            assert journal.tokens_in == sum(range(whole))
            # and it can be gone on with
            for entry in entries(3)[whole:]:
                journal.write(entry)
            assert [journal.get(entry["key"]) for entry in entries(3)] == entries(3)
        assert path.read_bytes() == content


def test_a_journal_damaged_in_its_middle_is_refused_by_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a", "tokens_in": 1, "tokens_out": 1}\n{"key": \n')
    with pytest.raises(ValueError, match="line 2 of .* is damaged"):
        ReplyJournal(path)


class Still(asyncio.SelectorEventLoop):
    """Whose clock stands."""

    def time(self):
        return 0.0


def test_a_pace_spreads_what_it_lets_through_evenly(monkeypatch):
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    async def turns():
        pace = Pace(per_minute=60 * 100)
        for amount in (1, 1, 2, 1):
            await pace.wait(amount)
        pace.correct(10)
        await pace.wait(1)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with asyncio.Runner(loop_factory=Still) as runner:
        runner.run(turns())
    assert waited == pytest.approx([0.01, 0.02, 0.04, 0.15])


def test_requests_and_tokens_per_minute_are_kept(tmp_path, monkeypatch):
    waited = Counter()

    async def wait(pace, amount):
        waited[pace.seconds_each] += amount

    monkeypatch.setattr(Pace, "wait", wait)
    tokens = sum(request.prompt_tokens() + request.reply_tokens for request in questions(11))
    with TeacherServer() as server:
        ask(server, tmp_path, questions(11), requests_per_minute=60, tokens_per_minute=6000)
    assert waited == {1.0: 11, 0.01: tokens}
