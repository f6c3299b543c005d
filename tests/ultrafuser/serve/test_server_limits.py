"""`serve` among strangers: what they cannot reach, what they cannot hold up, and answers that are nobody else's."""

import inspect
import socket

import pytest
import torch
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.http_clients import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    ask,
    running,
)
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.cli.app import app as command_line
from ultrafuser.serve import guard, server  # noqa: E402


pytest.importorskip("fastapi")
pytest.importorskip("openai")


TEMPLATE = "{% if note is defined %}[{{ note }}]{% endif %}" + CHAT_TEMPLATE


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=2) for name in ("text", "code")})
    stir_gate(model)
    # so that an answer is as long as it may be
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


def app(model, hosts=(), origins=(), key=None):
    access = guard.Access(guard.host_names("127.0.0.1", hosts), origins, key)
    return server.application(model, tokenizer(chat_template=TEMPLATE), "fused", access)


@pytest.fixture(scope="module")
def port(model):
    with running(app(model)) as port:
        yield port


def conversation(text="2+2?", **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


# --------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    "path",
    ["/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/openapi.json", "/metrics"],
)
def test_nothing_but_three_kinds_of_questions_can_be_asked(path, port):
    assert ask(port, path, {"model": "fused"})[0] == 404
    assert ask(port, path)[0] == 404


@pytest.mark.parametrize("name", ["owner/another", "../fused", "fused@main", "fused:x.gguf", ""])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_another_model_is_refused_and_both_names_are_told(path, name, port):
    status, answer = ask(port, path, {**conversation(), "prompt": "2", "input": "2", "model": name})
    assert status == 400
    assert repr(name) in answer["error"]["message"]
    assert "'fused'" in answer["error"]["message"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "10.0.0.1"],
)
def test_a_name_that_is_not_this_machine_s_is_refused(host, port):
    status, answer = ask(port, "/v1/models", headers={"Host": host})
    assert status == 400
    assert repr(host) in answer["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_this_machine_s_names_are_answered(host, port):
    assert ask(port, "/v1/models", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "http://[", "https://"])
@pytest.mark.parametrize(("method", "path"), [("POST", COMPLETIONS), ("GET", "/v1/models"), ("OPTIONS", CHAT)])
def test_a_page_of_another_origin_is_refused(method, path, origin, port):
    body = {"prompt": "2"} if method == "POST" else None
    status, answer = ask(port, path, body, method=method, headers={"Origin": origin})
    assert status == 403
    assert repr(origin) in answer["error"]["message"]


def test_a_page_of_the_server_itself_is_answered(port):
    assert ask(port, "/v1/models", headers={"Origin": f"http://127.0.0.1:{port}"})[0] == 200


def test_names_and_pages_are_answered_once_they_are_allowed(model):
    page = {"Origin": "https://page.example"}
    with running(app(model, hosts=["models.example"], origins=["https://page.example"], key="secret")) as port:
        asked = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert ask(port, CHAT, method="OPTIONS", headers=asked)[0] == 200
        assert ask(port, "/v1/models", headers=page)[0] == 401
        known = page | {"Host": "models.example", "Authorization": "Bearer secret"}
        assert ask(port, "/v1/models", headers=known)[0] == 200
        assert ask(port, "/v1/models", headers=known | {"Origin": "https://other.example"})[0] == 403


@pytest.mark.parametrize("sent", [None, "Bearer", "Bearer other", "secret", "Basic secret", "Basic b3RoZXI6b3RoZXI="])
def test_without_the_key_nothing_is_answered_but_that_the_server_is_well(model, sent):
    with running(app(model, key="secret")) as port:
        headers = {} if sent is None else {"Authorization": sent}
        assert ask(port, COMPLETIONS, {"prompt": "2"}, headers=headers)[0] == 401
        assert ask(port, "/health", headers=headers) == (200, {"status": "ok"})
        for right in ("Bearer secret", "bearer secret", "Basic YW55Ym9keTpzZWNyZXQ="):
            assert ask(port, "/v1/models", headers={"Authorization": right})[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "models.example", ""])
def test_an_address_that_others_reach_needs_a_key_or_a_word_for_it(host, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="MY_KEY holds no key"):
        guard.key_for(host, "MY_KEY", False)
    assert guard.key_for(host, "MY_KEY", True) is None
    monkeypatch.setenv("MY_KEY", "secret")
    assert guard.key_for(host, "MY_KEY", False) == "secret"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "::1"])
def test_this_machine_alone_needs_no_key(host, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    assert guard.key_for(host, "MY_KEY", False) is None


def test_on_all_addresses_names_must_be_allowed_and_numbers_need_not():
    assert {"*", "models.example"} <= guard.host_names("0.0.0.0", ["Models.example"])
    assert "*" not in guard.host_names("192.168.1.2")


# ------------------------------------------------------------------------------------------------- what others wrote


def test_uvicorn_s_protocol_has_what_ours_adds_to():
    from uvicorn.protocols.http.h11_impl import H11Protocol

    methods = ("connection_made", "data_received", "pause_writing", "resume_writing", "connection_lost")
    assert all(name in vars(H11Protocol) for name in methods)
    source = inspect.getsource(H11Protocol)
    assert all(f"self.{name}" in source for name in ("cycle", "connections", "transport", "loop"))


def test_a_port_that_is_taken_is_told(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Nothing can listen on port {number} of '127.0.0.1'"):
            guard.run(app(model), "127.0.0.1", number)
        # before a model is loaded
        line = ["serve", "no/such/model", "--host", "127.0.0.1", "--port", str(number)]
        done = CliRunner().invoke(command_line, line)
        assert done.exit_code == 2
        assert f"Nothing can listen on port {number} of '127.0.0.1': [Errno" in done.output
        assert "Serving" not in done.output
    guard.check_free("127.0.0.1", number)
