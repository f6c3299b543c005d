"""Which secret goes where: no recipe, server or report gets one that the user did not name for it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.support.teacher_server import TeacherServer, write_recipe
from ultrafuser.cli.app import app
from ultrafuser.data.recipe import load_recipe
from ultrafuser.evaluation.endpoint import Endpoint, EndpointError
from ultrafuser.journal import tokens
from ultrafuser.keys import SECRET, api_key


SECRET_KEY = "hf_" + "S" * 34
KEY = "a-key-of-this-server"


def make(tmp_path, url, *more, **changes):
    path = write_recipe(tmp_path, url, **changes)
    return CliRunner().invoke(
        app, ["data", "make", str(path), "--out", str(tmp_path / "set"), *more], env={"COLUMNS": "200"}
    )


def written(folder):
    return "".join(p.read_bytes().decode(errors="replace") for p in folder.rglob("*") if p.is_file())


class Echo(ThreadingHTTPServer):
    """Answers everything with an error, or a reply, that holds what it was sent."""

    def __init__(self, status):
        super().__init__(("127.0.0.1", 0), _Echo)
        self.status, self.seen = status, []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Echo(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):  # noqa: N802
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(self.headers)
        told = "x" * 250 + f" you sent {self.headers.get('Authorization')}"
        message = {"role": "assistant", "content": json.dumps({"items": [told]})}
        content = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        if self.server.status != 200:
            content = {"error": {"message": told}, "detail": told}
        body = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815


@pytest.mark.e2e
def test_a_recipe_does_not_choose_which_secret_goes_to_its_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with TeacherServer() as server:
        for more in ([], ["--yes"]):
            done = make(tmp_path, server.url, *more, teacher__api_key_variable="MY_KEY")
            assert done.exit_code == 2
            assert "If that is right: --key-variable MY_KEY" in done.output
            assert f"{server.url} with the key in MY_KEY" in done.output
        assert server.bodies == []
        done = make(tmp_path, server.url, "--key-variable", "MY_KEY", teacher__api_key_variable="OTHER")
    assert done.exit_code == 0, done.output
    assert server.bodies


@pytest.mark.grid
@pytest.mark.parametrize(
    "variable", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "OPENAI_API_KEY", "INNOCENT"]
)
def test_another_services_secret_is_not_sent_even_where_the_user_names_it(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, SECRET_KEY)
    with TeacherServer() as server:
        for done in (
            make(tmp_path, server.url, "--key-variable", variable),
            make(tmp_path, server.url, teacher__api_key_variable=variable),
        ):
            assert done.exit_code == 2
            assert f"{variable} is for" in done.output
            assert "If that is right" not in done.output
            assert SECRET_KEY not in done.output
    assert server.bodies == []


@pytest.mark.parametrize(
    ("url", "variable", "value", "words"),
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY", "sk-proj-1", None),
        ("https://router.huggingface.co/v1", "HF_TOKEN", SECRET_KEY, None),
        ("http://[::1]:8000/v1", "MY_KEY", KEY, None),
        ("http://localhost:8000/v1", "MY_KEY", KEY, None),
        ("https://api.openai.com.evil.example/v1", "OPENAI_API_KEY", "sk-proj-1", "is for openai.com alone"),
        ("https://evilopenai.com/v1", "OPENAI_API_KEY", "sk-proj-1", "is for openai.com alone"),
        ("https://example.com/v1", "hf_token", "x" * 9, "is for huggingface.co"),
        ("https://example.com/v1", "PATH", "/bin", "is for no model's server"),
        ("http://api.openai.com/v1", "OPENAI_API_KEY", "sk-proj-1", "could read OPENAI_API_KEY"),
        ("http://10.0.0.1/v1", "MY_KEY", KEY, "could read MY_KEY"),
        ("http://localhost.example.com/v1", "MY_KEY", KEY, "could read MY_KEY"),
        ("https://example.com/v1", "MY_KEY", "two\nlines", "printable ASCII"),
    ],
)
def test_a_key_goes_to_its_own_service_and_only_encrypted(url, variable, value, words, monkeypatch):
    monkeypatch.setenv(variable, value)
    if words is None:
        assert api_key(url, variable, "name another") == value
    else:
        with pytest.raises(ValueError, match=words) as caught:
            api_key(url, variable, "name another")
        assert value not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__base_url": "http://me:p4ssw0rd@127.0.0.1:1/v1"},
        {"teacher__base_url": "http://127.0.0.1:1/v1?api_key=p4ssw0rd"},
        {"teacher__parameters": {"api_key": "p4ssw0rd"}},
        {"teacher__parameters": {"extra": [{"X-Auth-Token": "p4ssw0rd"}]}},
        {"teacher__parameters": {"user": "ghp_" + "p4ssw0rd" * 5}},
        {"teacher__api_key": "p4ssw0rd"},
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_repeated_nowhere(changes, tmp_path):
    path = write_recipe(tmp_path, **changes)
    for command in (["plan", str(path)], ["make", str(path), "--out", str(tmp_path / "set")]):
        done = CliRunner().invoke(app, ["data", *command])
        assert done.exit_code == 2
        assert "p4ssw0rd" not in done.output
    assert not (tmp_path / "set").exists() or "p4ssw0rd" not in written(tmp_path / "set")


def test_ordinary_fields_of_a_request_are_no_secrets(tmp_path):
    fields = {
        "max_completion_tokens": 9,
        "top_k": 3,
        "chat_template_kwargs": {"enable_thinking": False},
        "logprobs": 1,
    }
    assert load_recipe(write_recipe(tmp_path, teacher__parameters=fields)).teacher.parameters == fields
    with pytest.raises(ValueError, match="'extra.token' looks like one"):
        Endpoint("judge", "http://localhost:1/v1", options={"extra": {"token": "p4ssw0rd"}})
    with pytest.raises(ValueError, match="holds no password"):
        Endpoint("judge", "http://me:p4ssw0rd@localhost:1/v1")


@pytest.mark.grid
@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_server_that_sends_the_key_back_has_it_neither_printed_nor_written(status, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "my-organisation")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: my-header")
    with Echo(status) as server:
        done = make(tmp_path, server.url, "--key-variable", "MY_KEY", teacher__retries=0)
        assert server.seen[0]["Authorization"] == f"Bearer {KEY}"
        assert not [headers for headers in server.seen if "my-" in str(headers)]
        assert KEY[:12] not in done.output
        assert KEY[:12] not in written(tmp_path / "set")
        questions = tmp_path / "questions.jsonl"
        questions.write_text(json.dumps({"id": "1", "turns": ["2+2?"]}) + "\n")
        arguments = [
            "judge",
            "m",
            "--questions",
            questions,
            "--judge",
            "j",
            "--judge-url",
            server.url,
            "--url",
            server.url,
        ]
        arguments += ["--key-variable", "MY_KEY", "--judge-key-variable", "MY_KEY", "--method", "grading"]
        arguments += ["--out", tmp_path / "judged", "--retries", "0"]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert f"'j' at {server.url} with the key in MY_KEY" in done.output
        assert KEY[:12] not in done.output
        assert KEY[:12] not in written(tmp_path / "judged")


def test_an_endpoints_key_is_for_its_server(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET_KEY)
    with pytest.raises(EndpointError, match="HF_TOKEN is for huggingface.co"):
        Endpoint("judge", "https://example.com/v1", "HF_TOKEN").key()


def test_what_a_server_says_was_used_is_believed_only_if_it_can_be():
    assert [tokens(told) for told in (3, 0, -5, "many", None, True, 2.5)] == [3, 0, *[None] * 5]


@pytest.mark.parametrize(
    "secret",
    [
        *("hf_" + "a" * 34, "ghp_" + "a" * 36, "github_pat_" + "a" * 60, "AKIA" + "A" * 16, "AIza" + "a" * 35),
        *("glpat-" + "a" * 20, "sk-proj-" + "a" * 40, "xoxb-1234567890-abc", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_what_looks_like_a_secret_is_known(secret):
    assert SECRET.search(f"token={secret}\n".encode())
    assert not SECRET.search(b"half_of it, sketchy-words, AKIAtopia, glpat-short")


def test_the_recipes_of_this_project_name_no_key():
    for path in (Path(__file__).parents[2] / "examples/recipes").glob("ultrachat*.yaml"):
        assert "api_key_variable" not in yaml.safe_load(path.read_text())["teacher"]
