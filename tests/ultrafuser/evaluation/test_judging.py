"""Judging through a server that is slow, refuses, talks nonsense or dies: nothing is lost and nothing asked twice."""

import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.judge_server import GREETING, ROWS, Server
from ultrafuser.cli.app import app
from ultrafuser.evaluation import judgements
from ultrafuser.evaluation.answers import AnswerJournal
from ultrafuser.evaluation.endpoint import Endpoint, EndpointError
from ultrafuser.evaluation.judge_scores import grading_scores, length_controlled, pairwise_scores
from ultrafuser.evaluation.questions import Question


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


def test_grades_are_of_every_turn_in_its_conversation_and_means_are_by_hand(serve, questions, tmp_path):
    grades = {"What is 2+2?": 9, "And 3 more?": 4, "Write a poem.": 6, "Write a title.": 8}

    def verdict(prompt):
        assert ("<reference_answer>" in prompt) == ("What is 2+2?" in prompt or "Write" in prompt)
        (last,) = re.findall(r"User:\n(.*)", prompt)[-1:]
        return f"Some reasons.\nVerdict: **[[{grades[last]}]]**"

    server = serve(answers_and(verdict))
    found = run(questions, tmp_path / "out", server.endpoint())
    assert found["score"] == (9 + 4 + 6 + 8) / 4
    assert found["by_category"] == {"math": 6.5, "writing": 7.0}
    assert found["by_turn"] == {"1": pytest.approx((9 + 6 + 8) / 3), "2": 4}
    # means of the three questions: 6.5, 6, 8
    assert found["standard_error"] == pytest.approx(np.std([6.5, 6, 8], ddof=1) / 3**0.5)
    assert found["interval"][0] <= found["score"] <= found["interval"][1]
    assert (found["judged"], found["unjudged"]) == (4, 0)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    second = next(r for r in server.requests if r["messages"][-1]["content"] == "And 3 more?")
    assert [m["content"] for m in second["messages"]] == ["What is 2+2?", "after 1", "And 3 more?"]
    graded = next(p for p in server.asked() if "And 3 more?" in p and "You grade" in p)
    assert "after 1" in graded
    assert "after 3" in graded
    assert "<reference_answer>\\n7\\n" in graded


def test_pairs_are_shown_in_both_orders_and_a_judge_that_favours_a_place_gives_ties(serve, questions, tmp_path):
    server = serve(answers_and(lambda prompt: "[[1]]"))
    found = run(questions, tmp_path / "out", server.endpoint(), method="pairwise")
    assert (found["win_rate"], found["won"], found["tied"], found["lost"]) == (0.5, 0, 3, 0)
    assert (found["consistent"], found["first_preferred"]) == (0.0, 1.0)
    prompts = [p for p in server.asked() if "Write a poem." in p and "answer_1" in p]
    assert sorted(p.index("Roses are red.") < p.index("after 1") for p in prompts) == [False, True]


def test_a_rerun_asks_for_nothing(serve, questions, tmp_path):
    server = serve(answers_and(lambda prompt: "[[7]]"))
    first = run(questions, tmp_path / "out", server.endpoint())
    asked = len(server.requests)
    assert run(questions, tmp_path / "out", server.endpoint()) == first
    assert len(server.requests) == asked


@pytest.mark.grid
@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_refusals_are_tried_again_and_no_verdict_is_lost(status, serve, questions, tmp_path):
    failed = set()

    def verdict(prompt):
        if prompt in failed:
            return "[[5]]"
        failed.add(prompt)
        return status

    server = serve(answers_and(verdict))
    found = run(questions, tmp_path / "out", server.endpoint())
    assert (found["score"], found["unjudged"]) == (5, 0)
    assert {n for p, n in server.asked().items() if "You grade" in p} == {2}


def test_a_slow_server_is_asked_for_no_more_at_once_than_wanted(serve, questions, tmp_path):
    waiting = threading.Event()

    def verdict(prompt):
        waiting.wait(0.05)
        return "[[5]]"

    server = serve(answers_and(verdict))
    run(questions, tmp_path / "out", server.endpoint(concurrency=2))
    assert server.most_busy == 2


def test_a_server_that_never_answers_in_time_is_named(serve, questions, tmp_path):
    released = threading.Event()
    server = serve(lambda messages: released.wait(10) and "late")
    with pytest.raises(EndpointError, match=rf"{server.url} did not answer within 0.2 s in 2 tries"):
        run(questions, tmp_path / "out", server.endpoint(retries=1, timeout=0.2))
    released.set()


@pytest.mark.grid
@pytest.mark.parametrize("nonsense", ["I like it.", "[[11]]", "[[7]] or [[8]]", "[[7]]\nWell.", "", b"{}", b"no json"])
def test_nonsense_is_asked_about_again_then_counted_as_unjudged_and_never_as_a_grade(
    nonsense, serve, questions, tmp_path
):
    server = serve(answers_and(lambda prompt: nonsense if "poem" in prompt else "[[9]]"))
    found = run(questions, tmp_path / "out", server.endpoint())
    assert (found["score"], found["judged"], found["unjudged"]) == (9, 3, 1)
    asked = [r["messages"] for r in server.requests if "You grade" in str(r) and "poem" in str(r)]
    assert [len(messages) for messages in asked] == [1, 3, 3]
    run(questions, tmp_path / "out", server.endpoint())
    assert len([r for r in server.requests if "You grade" in str(r) and "poem" in str(r)]) == 3


def test_a_verdict_given_when_asked_again_counts(serve, questions, tmp_path):
    server = serve(lambda messages: "[[3]]" if len(messages) == 3 and "does not end" in str(messages) else "Hm.")
    assert run(questions, tmp_path / "out", server.endpoint())["score"] == 3


def test_a_question_unjudged_in_one_order_is_unjudged(serve, questions, tmp_path):
    def verdict(prompt):
        return "no idea" if prompt.index("Roses are red") < prompt.index("after 1") else "[[1]]"

    server = serve(answers_and(lambda prompt: verdict(prompt) if "poem" in prompt else "[[tie]]"))
    found = run(questions, tmp_path / "out", server.endpoint(), method="pairwise")
    assert (found["win_rate"], found["tied"], found["unjudged"]) == (0.5, 2, 1)


def test_what_the_judge_refuses_to_read_is_unjudged_with_its_words(serve, questions, tmp_path):
    server = serve(answers_and(lambda prompt: 400 if "poem" in prompt else "[[9]]"))
    found = run(questions, tmp_path / "out", server.endpoint())
    assert (found["score"], found["unjudged"]) == (9, 1)
    assert "scripted" in (tmp_path / "out" / "judgements.jsonl").read_text()


def test_options_that_the_judge_refuses_stop_before_anything_is_generated(serve, questions, tmp_path):
    server = serve(lambda messages: 400)
    with pytest.raises(EndpointError, match=r"cannot take a request for 'judge' with {'temperature': 0}.*scripted"):
        run(questions, tmp_path / "out", server.endpoint(options={"temperature": 0}))
    assert [r["messages"][0]["content"] for r in server.requests] == [GREETING]
    assert server.requests[0]["temperature"] == 0


@pytest.mark.grid
@pytest.mark.parametrize("method", judgements.METHODS)
@pytest.mark.parametrize("alive", [0, 3, 5, 7])
def test_a_server_that_dies_half_way_keeps_all_and_a_rerun_does_only_the_rest(
    method, alive, serve, questions, tmp_path
):
    """Requests that got an answer are counted over both runs: none twice, and together every one."""
    answered = []

    def reply(messages):
        if messages[0]["content"] == GREETING:
            return "ready"
        if len(answered) >= limit[0]:
            return None
        answered.append(json.dumps(messages))
        return answers_and(lambda prompt: "[[1]]")(messages)

    limit = [alive]
    server = serve(reply)
    with pytest.raises(EndpointError, match="could not be reached.*Nothing is lost.*run the same command again"):
        run(questions, tmp_path / "out", server.endpoint(retries=0, concurrency=2), method=method)
    kept = sum(len(p.read_text().splitlines()) - 1 for p in (tmp_path / "out").glob("*.jsonl"))
    assert kept == alive
    limit[0] = 1000
    found = run(questions, tmp_path / "out", server.endpoint(), method=method)
    assert found["unjudged"] == 0
    assert len(answered) == len(set(answered)) == 4 + {"grading": 4, "pairwise": 6}[method]


@pytest.mark.process
def test_a_killed_run_is_taken_up_where_it_was(serve, questions, tmp_path):
    answered, stuck, release = [], threading.Event(), threading.Event()

    def reply(messages):
        if messages[0]["content"] == GREETING:
            return "ready"
        if len(answered) == 6 and not release.is_set():
            stuck.set()
            release.wait(60)
            return None
        answered.append(json.dumps(messages))
        return answers_and(lambda prompt: "[[8]]")(messages)

    server = serve(reply)
    script = """
import sys
from pathlib import Path
from ultrafuser.evaluation import judgements
from ultrafuser.evaluation.endpoint import Endpoint
judge = Endpoint("judge", sys.argv[1], concurrency=1)
judgements.run(judge, questions=sys.argv[2], judge=judge, out=Path(sys.argv[3]), method="grading")
"""
    process = subprocess.Popen([sys.executable, "-c", script, server.url, questions, tmp_path / "out"])
    assert stuck.wait(120)
    process.kill()
    process.wait()
    release.set()
    found = run(questions, tmp_path / "out", server.endpoint())
    assert (found["score"], found["judged"]) == (8, 4)
    assert len(answered) == len(set(answered)) == 8


def test_an_unreachable_judge_is_named_before_anything_is_generated(serve, questions, tmp_path):
    answerer, gone = serve(), Server()
    gone.close()
    with pytest.raises(EndpointError, match=rf"{gone.url} could not be reached in one try"):
        run(questions, tmp_path / "out", gone.endpoint(retries=0), answerer.endpoint("served"))
    assert answerer.requests == []


def test_a_model_that_the_judges_server_does_not_know_is_named_with_those_it_knows(serve, questions, tmp_path):
    server = serve()
    with pytest.raises(EndpointError, match=r"does not know the model 'jugde'. It knows \['judge', 'served'\]"):
        run(questions, tmp_path / "out", server.endpoint("jugde"))


def test_keys_come_from_the_environment_and_go_to_their_own_server_only(serve, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai's")
    server = serve(answers_and(lambda prompt: "[[7]]"), key="right")
    with pytest.raises(EndpointError, match="JUDGE_KEY is not set"):
        run(questions, tmp_path / "out", server.endpoint(key_variable="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", "wrong")
    with pytest.raises(EndpointError, match="refused the API key, which came from JUDGE_KEY"):
        run(questions, tmp_path / "out", server.endpoint(key_variable="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", "right")
    assert run(questions, tmp_path / "out", server.endpoint(key_variable="JUDGE_KEY"))["score"] == 7
    assert server.endpoint().key() == "none"
    assert Endpoint("gpt").key() == "openai's"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        Endpoint("gpt").key()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"method": None}, r"`method` must be one of \('pairwise', 'grading'\).* but got None"),
        ({"method": "pairwise", "limit": 2}, r"needs another answer for every turn, but 1 .* such as \['bare'\]"),
        ({"revision": "abc"}, "A revision belongs to a data set on the Hub"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_asked(settings, fault, serve, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"id": "bare", "turns": ["x"]}\n')
    server = serve()
    with pytest.raises(ValueError, match=fault):
        run(path, tmp_path / "out", server.endpoint(), **settings)
    assert server.requests == []


def test_prompts_of_ones_own_are_used_and_checked(serve, questions, tmp_path):
    for name in ("grading", "grading_with_reference"):
        (tmp_path / f"{name}.md").write_text((judgements.PROMPTS / f"{name}.md").read_text() + "\nBe kind for $$1.")
    server = serve(answers_and(lambda prompt: "[[9]]" if prompt.endswith("Be kind for $1.") else "[[1]]"))
    assert run(questions, tmp_path / "out", server.endpoint(), prompts=tmp_path)["score"] == 9
    (tmp_path / "grading.md").write_text("You grade $answer")
    with pytest.raises(ValueError, match=r"must hold the fields \['\$conversation'\].* but holds \['answer'\]"):
        run(questions, tmp_path / "out", server.endpoint(), prompts=tmp_path)


def test_work_done_with_other_settings_is_never_taken_for_this(serve, questions, tmp_path):
    server = serve(answers_and(lambda prompt: "[[7]]"))
    run(questions, tmp_path / "out", server.endpoint())
    with pytest.raises(ValueError, match=r"answers.jsonl' was begun with others \(options: .*1024.*then, .*9"):
        run(questions, tmp_path / "out", server.endpoint(), max_new_tokens=9)
    with pytest.raises(
        ValueError, match=r"judgements.jsonl' was begun with others \(judge: 'judge' then, 'served' now"
    ):
        run(questions, tmp_path / "out", server.endpoint("served"), server.endpoint())


def test_two_models_are_compared_with_each_other(serve, questions, tmp_path):
    def reply(messages):
        first = messages[0]["content"]
        return "[[1]]" if first.index("short") < first.index("a longer one") else "[[2]]"

    judge = serve(lambda messages: reply(messages) if "You compare" in messages[0]["content"] else "ready")
    short, long = serve(lambda messages: "short"), serve(lambda messages: "a longer one")
    run(questions, tmp_path / "long", serve().endpoint(), long.endpoint("served"))
    compared = {"method": "pairwise", "against": tmp_path / "long" / "answers.jsonl"}
    found = run(questions, tmp_path / "short", judge.endpoint(), short.endpoint("served"), **compared)
    assert (found["win_rate"], found["won"], found["consistent"], found["first_preferred"]) == (1.0, 3, 1.0, 0.5)
    assert found["mean_length"] == {"ours": pytest.approx(4 * 5 / 3), "theirs": pytest.approx(4 * 12 / 3)}
    assert found["length_controlled_win_rate"] is None
    with pytest.raises(ValueError, match="holds answers to others"):
        run(questions, tmp_path / "fewer", judge.endpoint(), short.endpoint("served"), limit=1, **compared)


def test_a_half_written_line_is_cut_off_and_done_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    with AnswerJournal(path, {"a": 1}) as journal:
        journal.add("x", 0, answer="é\u2028\n")
        whole = path.read_bytes()
        journal.add("y", 0, answer="gone")
    path.write_bytes(path.read_bytes()[:-4])
    with AnswerJournal(path, {"a": 1}) as journal:
        assert journal.rows == {("x", 0): {"id": "x", "part": 0, "answer": "é\u2028\n"}}
        assert path.read_bytes() == whole
    path.write_bytes(b'{"a"')
    with AnswerJournal(path, {"a": 2}) as journal:
        assert journal.rows == {}
    assert path.read_bytes() == b'{"a": 2}\n'


def test_two_runs_do_not_write_to_one_folder(serve, questions, tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def verdict(prompt):
        inside.set()
        leave.wait(10)
        return "[[7]]"

    server = serve(answers_and(verdict))
    other = threading.Thread(target=run, args=(questions, tmp_path / "out", server.endpoint()))
    other.start()
    inside.wait(10)
    with pytest.raises(FileExistsError, match="another one is writing"):
        run(questions, tmp_path / "out", server.endpoint())
    leave.set()
    other.join()


def test_preferences_fade_to_one_half_when_only_length_made_them():
    """A judge that always takes the longer answer prefers neither at equal length."""
    differences = np.array([-300, -200, -100, -50, 50, 100, 200, 300, 400, 250.0])
    by_length = length_controlled((differences > 0).astype(float), differences)
    assert abs(by_length - 0.5) < 0.1 < abs((differences > 0).mean() - 0.5) + 0.01
    without = length_controlled(np.array([1, 1, 1, 0.0]), np.zeros(4))
    assert without == pytest.approx(0.75, abs=1e-3)
    assert length_controlled(np.array([0.5, 0.5]), np.array([3, 9])) == pytest.approx(0.5, abs=1e-3)
    assert length_controlled(np.ones(3), np.arange(3)) is None


def test_scores_of_nothing_are_unknown():
    asked = [Question("a", ["x"], reference=["y"])]
    answers = {"a": ["y"]}
    assert pairwise_scores(asked, {("a", 0): None, ("a", 1): "1"}, answers, answers)["win_rate"] is None
    assert grading_scores(asked, {("a", 0): None})["score"] is None


def test_the_command_says_scores_and_says_faults_without_a_traceback(serve, questions, tmp_path):
    server = serve(answers_and(lambda prompt: "[[7]]"))
    command = ["judge", "served", "--url", server.url, "--questions", str(questions), "--method", "grading"]
    command += ["--judge", "judge", "--judge-url", server.url, "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "7.00 of 10" in shown.output
    assert {r["temperature"] for r in server.requests} == {0}
    shown = CliRunner().invoke(app, [*command, "--judge", "other"])
    assert shown.exit_code == 2
    assert "was begun with others" in shown.output
    assert isinstance(shown.exception, SystemExit)
    shown = CliRunner().invoke(app, [*command, "--judge-options", "temperature=0"])
    assert shown.exit_code == 2
    assert "an object in JSON was expected" in " ".join(shown.output.split())
