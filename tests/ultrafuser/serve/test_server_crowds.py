"""Many clients at once: nobody holds up another, and answers are nobody else's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.http_clients import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    ask,
    ended,
    opened,
    request,
    running,
    until,
)
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.serve import guard, served_model, server  # noqa: E402


pytest.importorskip("fastapi")
pytest.importorskip("openai")


TEMPLATE = "{% if note is defined %}[{{ note }}]{% endif %}" + CHAT_TEMPLATE


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
    access = guard.Access(guard.host_names("127.0.0.1"))
    return server.application(model, tokenizer(chat_template=chat_template), "fused", access, **settings)


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
    make = served_model.Asked.__init__
    monkeypatch.setattr(
        served_model.Asked, "__init__", lambda self, *given: (make(self, *given), asked.append(self))[0]
    )
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
    monkeypatch.setattr(served_model, "AT_ONCE", 1)
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
    monkeypatch.setattr(served_model, "AT_ONCE", 1)
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


@pytest.mark.e2e
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


@pytest.mark.e2e
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
