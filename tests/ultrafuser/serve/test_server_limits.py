"""`serve` among strangers: what they cannot reach, what they cannot hold up, and answers that are nobody else's."""

import inspect
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

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
    ended,
    message,
    opened,
    request,
    running,
    until,
)
from tests.support.tiny import specialist, stir_gate, tokenizer


pytest.importorskip("fastapi")
pytest.importorskip("openai")
from ultrafuser.cli.app import app as command_line  # noqa: E402
from ultrafuser.serve import guard, server  # noqa: E402
from ultrafuser.serve.server import template_variables  # noqa: E402


TEMPLATE = "{% if note is defined %}[{{ note }}]{% endif %}" + CHAT_TEMPLATE
LIMIT = 256
PROMPTS = [f"{i} plus {i} is what?" for i in range(16)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=2) for name in ("text", "code")})
    stir_gate(model)
    # so that an answer is as long as it may be
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


def app(model, chat_template=TEMPLATE, **settings):
    settings = {"hosts": guard.host_names("127.0.0.1")} | settings
    return server.application(model, tokenizer(chat_template=chat_template), "fused", **settings)


@pytest.fixture(scope="module")
def port(model):
    with running(app(model)) as port:
        yield port


def alone(model, prompt, tokens=12, **settings):
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)[
        0, ids.shape[1] :
    ]
    return tokenizer().decode(ids)


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
    hosts = guard.host_names("127.0.0.1", ["models.example"])
    with running(app(model, hosts=hosts, origins=["https://page.example"], key="secret")) as port:
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


# ------------------------------------------------------------------------------------------ what requests may hold

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(
    "variables",
    [
        {"chat_template": LOOPS},
        {"chat_template": "x"},
        {"conversation": [], "tokenize": False},
        {"tokenizer_kwargs": {}},
        {"note": {"deep": 1}},
        {"note": "x" * 1000},
    ],
)
def test_a_template_of_a_request_is_not_rendered(path, variables, port):
    status, answer = ask(port, path, {**conversation(), "input": "2+2?", "chat_template_kwargs": variables})
    assert status == 422
    assert "chat_template_kwargs" in answer["error"]["message"]
    assert ask(port, "/health")[0] == 200


@pytest.mark.parametrize("written", ["[1]", "{", '{"chat_template": "x"}', '"x"'])
def test_variables_of_the_command_line_are_named_values(written):
    done = CliRunner().invoke(command_line, ["serve", "no/such/model", "--chat-template-kwargs", written])
    assert done.exit_code == 2
    assert "Variables of the chat template" in done.output
    assert template_variables(None) == {}
    assert template_variables('{"deep": {"a": [1]}}') == {"deep": {"a": [1]}}


def test_what_the_model_s_own_template_knows_can_be_set(port):
    tokens = [
        ask(port, CHAT, conversation(chat_template_kwargs=given))[1]["usage"]["prompt_tokens"]
        for given in ({}, {"note": "no"})
    ]
    assert tokens[1] - tokens[0] == len("[no]")


def test_a_template_of_the_model_that_never_ends_is_given_up_and_holds_nobody_up(model, monkeypatch):
    monkeypatch.setattr("trainers.template_sandbox.SECONDS", 1.0)
    with running(app(model, LOOPS)) as port, ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, port, CHAT, conversation())
        assert ask(port, body={"prompt": "2", "max_tokens": 2})[0] == 200
        status, answer = asked.result()
        assert status == 400
        assert "longer than 1 s" in answer["error"]["message"]


def test_a_chat_with_a_model_that_has_no_template_is_refused(model):
    with running(app(model, None)) as port:
        status, answer = ask(port, CHAT, conversation())
        assert status == 400
        assert "no chat template" in answer["error"]["message"]


ODD_BODIES = [
    *(b"", b"null", b"[]", b"1", b"{", b'{"messages": ', b"\xff", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'),
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "2", "seed": ' + b"9" * 10_000 + b"}", b'{"prompt": NaN}'),
]
ODD_FIELDS = [
    *({"messages": value} for value in (None, [], {}, "2", [None], [[]], [{}], [{"role": 1}], [{"role": ["user"]}])),
    *({"messages": [{"role": "user", "content": value}]} for value in (1, {}, [1], [{}], [{"type": "text"}])),
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    *(
        {"messages": [{"role": "user", "content": "2", "tool_calls": value}]}
        for value in (1, [1], [{}], [{"function": 1}])
    ),
    {"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    *({"max_tokens": value} for value in (0, -1, 1.5, "4", True, [])),
    *({"temperature": value} for value in (-1, "1", 1e-30, 1e300, [], True)),
    *({"top_p": value} for value in (0, -1, 2, "x")),
    *({"frequency_penalty": value} for value in (-1, -2, 1e9, "x")),
    *({"seed": value} for value in (1.5, "x", 2**64, -(2**64))),
    *({"stop": value} for value in ("", [], [""], [1], {}, 1, ["x"] * 5, "x" * 101)),
    *(
        {"logit_bias": value}
        for value in ({"x": 1}, {"-1": 1}, {"99": 1}, {"1": "x"}, {"1": 1e9}, [], {"٣": 1}, {"0" * 20 + "99": 1})
    ),
    *({"stream": value} for value in ("yes", 1, [])),
    *({"tools": value} for value in ({}, [1], "x")),
    *({"model": value} for value in (1, ["fused"], {})),
    *({"generation_config": value} for value in ("{}", {}, '{"num_beams": 100000}')),
    {"custom_generate": "owner/code"},
    {"trust_remote_code": True},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_odd_requests_are_told_what_is_odd_and_none_fails_inside(path, port):
    usual = {CHAT: conversation(), COMPLETIONS: {"prompt": "2"}, RESPONSES: {"input": "2", "stream": False}}[path]
    odd = [{**usual, **fields} for fields in ODD_FIELDS if path == CHAT or "messages" not in fields]
    odd += [
        {RESPONSES: {"input": value}, COMPLETIONS: {"prompt": value}}.get(path, {})
        for value in (1, "", [], [1], {}, None)
    ]
    found = [(ask(port, path, body), body) for body in [*ODD_BODIES, *odd]]
    assert [(answer, body) for answer, body in found if answer[0] not in (400, 422)] == []
    assert all(len(message(answer)) > 10 for answer, _ in found)
    assert ask(port, path, usual)[0] == 200


def test_what_is_no_json_by_its_own_word_is_refused_as_pages_may_send_it_without_asking(port):
    assert ask(port, COMPLETIONS, {"prompt": "2"}, headers={"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_a_prompt_longer_than_the_model_reads_is_refused_with_both_numbers(path, stream, port):
    text = "9" * (LIMIT + 50)
    asked = {CHAT: conversation(text), COMPLETIONS: {"prompt": text}, RESPONSES: {"input": text}}[path]
    status, answer = ask(port, path, {**asked, "stream": stream})
    told = LIMIT + 50 + (len("<user>\n<assistant>") if path != COMPLETIONS else 0)
    assert status == 400
    assert f"{told} tokens, but the model reads {LIMIT}" in answer["error"]["message"]
    assert ask(port, COMPLETIONS, {"prompt": "9" * LIMIT, "stream": stream})[0] == 400


@pytest.mark.parametrize("length", [{}, {"max_tokens": 4000}])
def test_an_answer_ends_where_the_model_s_context_does_and_says_so(length, port):
    _, answer = ask(port, COMPLETIONS, {"prompt": "9" * (LIMIT - 7), **length})
    assert answer["usage"] == {"prompt_tokens": LIMIT - 7, "completion_tokens": 7, "total_tokens": LIMIT}
    assert answer["choices"][0]["finish_reason"] == "length"
    _, streamed = ask(port, COMPLETIONS, {"prompt": "9" * (LIMIT - 7), "stream": True, **length})
    last = json.loads(streamed.strip().splitlines()[-1].removeprefix("data: "))
    assert (last["choices"][0]["finish_reason"], last["usage"]["total_tokens"]) == ("length", LIMIT)


# ------------------------------------------------------------------------------------------- who cannot hold others up


def test_a_body_that_is_too_large_is_refused_before_it_is_read(port):
    head = request({"prompt": "2"}, length=100 * 2**20)
    connection = opened(port, head)
    assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    connection.close()


def test_a_client_that_sends_a_hundred_megabytes_before_it_reads_is_told_why_they_are_not_taken(port):
    status, answer = ask(port, COMPLETIONS, b" " * (100 * 2**20))
    assert status == 413
    assert "1,048,576 bytes, but this one has 104,857,600" in answer["error"]["message"]


def test_a_body_that_does_not_say_its_length_ends_at_the_limit_too(port):
    connection = opened(port, request({}).replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").split(b"{}")[0])
    for _ in range(20):
        connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    connection.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"])
def test_a_client_that_never_ends_its_request_s_head_is_let_go(sent, model, monkeypatch):
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    with running(app(model)) as port:
        connection = opened(port, sent)
        assert ended(connection)
        assert ask(port, "/health")[0] == 200


def test_a_client_that_never_ends_its_body_is_told_and_let_go(model, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with running(app(model)) as port:
        connection = opened(port, request({"prompt": "2"}, length=500))
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert ended(connection)


def test_a_client_that_reads_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(guard, "STALL_SECONDS", 0.3)
    over = threading.Event()

    async def pours(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect" and not over.is_set():
            try:
                for _ in range(1000):
                    await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
                    if scope["state"].get("gone"):
                        break
            finally:
                over.set()

    with running(pours) as port:
        connection = opened(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(over.is_set)
        connection.close()


class Held:
    """The model's first layer does not go on for prompts of a length, until it is let."""

    def __init__(self, model, tokens):
        self.go, self.reached, self.later = threading.Event(), threading.Event(), 0
        layers = model.model.specialists["text"].layers
        self.hooks = [
            layers[0].register_forward_pre_hook(lambda _, inputs: self.wait(inputs[0].shape[1] == tokens)),
            layers[1].register_forward_pre_hook(lambda _, inputs: self.count(inputs[0].shape[1] == tokens)),
        ]

    def wait(self, it):
        if it:
            self.reached.set()
            assert self.go.wait(30)

    def count(self, it):
        self.later += it

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.go.set()
        for hook in self.hooks:
            hook.remove()


def test_one_request_that_takes_for_ever_does_not_hold_up_another(port, model):
    with Held(model, tokens=100) as held, ThreadPoolExecutor() as pool:
        long = pool.submit(ask, port, COMPLETIONS, {"prompt": "9" * 100, "max_tokens": 2})
        held.reached.wait(30)
        assert ask(port, COMPLETIONS, {"prompt": PROMPTS[0], "max_tokens": 12})[1]["choices"][0]["text"] == alone(
            model, PROMPTS[0]
        )
        held.go.set()
        assert long.result()[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_a_client_that_hangs_up_while_its_prompt_is_read_stops_at_the_next_layer(path, stream, model, monkeypatch):
    asked = []
    make = server.Asked.__init__
    monkeypatch.setattr(server.Asked, "__init__", lambda self, *given: (make(self, *given), asked.append(self))[0])
    text = "9" * (100 if path == COMPLETIONS else 100 - len("<user>\n<assistant>"))
    body = {CHAT: conversation(text), COMPLETIONS: {"prompt": text}, RESPONSES: {"input": text}}[path]
    with running(app(model)) as port, Held(model, tokens=100) as held:
        connection = opened(port, request({**body, "stream": stream}, path))
        held.reached.wait(30)
        connection.close()
        until(lambda: asked[0].over.is_set())
        held.go.set()
        assert ask(port, "/health")[0] == 200
        assert held.later == 0


def test_a_client_that_hangs_up_while_it_waits_is_not_answered_at_all(model, monkeypatch):
    monkeypatch.setattr(server, "AT_ONCE", 1)
    with running(app(model)) as port, Held(model, tokens=100) as held:
        first = opened(port, request({"prompt": "9" * 100, "max_tokens": 1}))
        held.reached.wait(30)
        read = []
        hook = model.model.register_forward_pre_hook(
            lambda _, inputs, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        opened(port, request({"prompt": "9" * 50, "max_tokens": 1})).close()
        held.go.set()
        assert ask(port, COMPLETIONS, {"prompt": "9" * 30, "max_tokens": 1})[0] == 200
        hook.remove()
        assert 50 not in read
        first.close()


def test_more_requests_than_may_wait_are_refused_in_words_and_room_is_made_again(model, monkeypatch):
    monkeypatch.setattr(server, "AT_ONCE", 1)
    monkeypatch.setattr(server, "WAITING", 0)
    with running(app(model)) as port, Held(model, tokens=100) as held, ThreadPoolExecutor() as pool:
        first = pool.submit(ask, port, COMPLETIONS, {"prompt": "9" * 100, "max_tokens": 1})
        held.reached.wait(30)
        status, answer = ask(port, COMPLETIONS, {"prompt": "2"})
        assert status == 503
        assert "1 requests are being answered or wait" in answer["error"]["message"]
        held.go.set()
        assert first.result()[0] == 200
        until(lambda: ask(port, COMPLETIONS, {"prompt": "2", "max_tokens": 1})[0] == 200)


# ---------------------------------------------------------------------------------------------- nobody is mixed up


def test_sixteen_at_once_among_slow_and_gone_ones_are_answered_as_alone(port, model):
    slow = [opened(port, request({"prompt": "2"}, length=500)) for _ in range(20)]
    for _ in range(5):
        opened(port, request({"prompt": "gone", "max_tokens": 200, "stream": True})).close()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: ask(port, COMPLETIONS, {"prompt": p, "max_tokens": 12}), PROMPTS))
    assert [a["choices"][0]["text"] for _, a in answers] == [alone(model, p) for p in PROMPTS]
    assert len({a["id"] for _, a in answers}) == len(PROMPTS)
    for connection in slow:
        connection.close()


def test_a_client_s_own_name_for_its_request_is_nobody_s_name(port):
    _, answer = ask(port, COMPLETIONS, {"prompt": "2", "max_tokens": 1}, headers={"X-Request-ID": "mine"})
    assert answer["id"] != "mine"


def test_eight_with_seeds_at_once_draw_what_each_seed_draws_alone(model):
    # torch has one random state for all threads
    model.generation_config.do_sample = True
    try:
        with running(app(model)) as port, ThreadPoolExecutor(16) as pool:
            bodies = [{"prompt": PROMPTS[0], "max_tokens": 12, "seed": i % 8} for i in range(16)]
            said = [a["choices"][0]["text"] for _, a in pool.map(lambda b: ask(port, COMPLETIONS, b), bodies)]
            unseeded = {ask(port, COMPLETIONS, {**bodies[0], "seed": None})[1]["choices"][0]["text"] for _ in range(4)}
        expected = []
        for i in range(8):
            torch.manual_seed(i)
            expected.append(alone(model, PROMPTS[0]))
    finally:
        model.generation_config.do_sample = False
    assert said == expected * 2
    assert len(set(expected)) > 4
    assert len(unseeded) > 1


def test_continuous_batching_answers_all_as_alone_with_the_model_s_sampling(model):
    with running(app(model, continuous_batching=True)) as port, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda p: ask(port, COMPLETIONS, {"prompt": p, "max_tokens": 12}), PROMPTS[:8])
        assert [a["choices"][0]["text"] for _, a in answers] == [alone(model, p) for p in PROMPTS[:8]]
        status, answer = ask(port, COMPLETIONS, {"prompt": "2", "temperature": 0.5})
        assert status == 400
        assert "['temperature']" in answer["error"]["message"]


# ------------------------------------------------------------------------------------------------- what others wrote


def test_transformers_server_has_what_ours_is_made_of():
    from transformers.cli.serving import chat_completion, completion, response, utils

    def parameters(function):
        return list(inspect.signature(function).parameters)

    for handler in (chat_completion.ChatCompletionHandler, completion.CompletionHandler, response.ResponseHandler):
        assert parameters(handler.__init__)[:3] == ["self", "model_manager", "generation_state"]
        assert parameters(handler.handle_request) == ["self", "body", "request_id"]
    assert parameters(utils.BaseHandler.get_processor_inputs_from_messages) == ["messages", "modality"]
    assert parameters(response.ResponseHandler._normalize_input) == ["body"]
    assert parameters(response.ResponseHandler._normalize_tools) == ["tools"]
    for name in ("submit", "async_submit"):
        assert parameters(getattr(utils.GenerateManager, name)) == ["self", "fn", "args", "kwargs"]
    assert parameters(utils.CBGenerateManager.init_cb) == ["self", "model", "gen_config"]
    asked_of = inspect.getsource(utils) + "".join(map(inspect.getsource, (chat_completion, completion, response)))
    asked_for = set(re.findall(r"self\.model_manager\.(\w+)", asked_of))
    assert asked_for <= {"force_model", "process_model_name", "load_model_and_processor", "get_model_modality"}


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
