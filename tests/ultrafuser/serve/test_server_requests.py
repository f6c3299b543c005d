"""What requests may hold: odd ones are told what is odd."""

import json
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
    message,
    running,
)
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.cli.app import app as command_line  # noqa: E402
from ultrafuser.decoding.dropping import drop_specialists
from ultrafuser.route.prompt_route import PromptRoute  # noqa: E402
from ultrafuser.route.router_base import Router  # noqa: E402
from ultrafuser.serve import guard, server  # noqa: E402
from ultrafuser.serve.request_fields import template_variables  # noqa: E402


pytest.importorskip("fastapi")
pytest.importorskip("openai")


TEMPLATE = "{% if note is defined %}[{{ note }}]{% endif %}" + CHAT_TEMPLATE


LIMIT = 256


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


def conversation(text="2+2?", **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


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


@pytest.mark.e2e
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
    *(
        {"gate_prior": value}
        for value in ({"law": 1}, {}, {"code": 0}, {"code": -1}, {"code": "x"}, {"code": 1e9}, {"code": 1e-60}, [1, 1])
    ),
    {"custom_generate": "owner/code"},
    {"trust_remote_code": True},
]


@pytest.mark.grid
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
    last = json.loads(streamed.strip().splitlines()[-3].removeprefix("data: "))
    assert (last["choices"][0]["finish_reason"], last["usage"]["total_tokens"]) == ("length", LIMIT)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_a_stream_ends_with_the_event_that_clients_of_openai_wait_for(path, port):
    length = "max_output_tokens" if path == RESPONSES else "max_tokens"
    asked = {CHAT: conversation(), COMPLETIONS: {"prompt": "2+2?"}, RESPONSES: {"input": "2+2?"}}[path]
    _, streamed = ask(port, path, {**asked, length: 4, "stream": True})
    events = [line for line in streamed.splitlines() if line.startswith("data: ")]
    assert len(events) > 4
    # which responses have an event of their own for
    assert events.count("data: [DONE]") == (path != RESPONSES)
    assert (events[-1] == "data: [DONE]") == (path != RESPONSES)


def test_requests_are_decoded_as_the_server_is_told(model):
    body = {"prompt": "2+2", "max_tokens": 12, "temperature": 0}

    def answer(**decoding):
        with running(app(model, decoding=decoding)) as port:
            return [
                ask(port, body={**body, **more})[1]["choices"][0]["text"]
                for more in ({}, {"temperature": 1, "seed": 3})
            ]

    plain = answer()
    dropping = {"custom_generate": drop_specialists, "every": 100}
    assert answer(**dropping, keep="none") == plain
    assert answer(**dropping, keep="top_k:1") != plain


# ------------------------------------------------------------------------------------------------- who answers


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_chooses_its_specialist(path, port, model):
    asked = {CHAT: conversation(), COMPLETIONS: {"prompt": "2+2?", "max_tokens": 4}}[path]
    prompt = tokenizer()("<user>2+2?\n<assistant>" if path == CHAT else "2+2?", return_tensors="pt")["input_ids"]
    for name in ("text", "code"):
        alone = model.specialist(name).generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
        choice = ask(port, path, {**asked, "gate_prior": {name: 2}})[1]["choices"][0]
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) == tokenizer().decode(alone)
    plain, even = (ask(port, path, {**asked, **more})[1] for more in ({}, {"gate_prior": {"text": 1, "code": 1}}))
    assert plain["choices"] == even["choices"]


def test_a_server_with_a_router_answers_as_it_chooses_and_a_request_has_the_last_word(model):
    router = Router({})
    router.prior = lambda prompts: torch.tensor([[0.3, 0.7]])
    route = PromptRoute(model, tokenizer(), router, alone=True)
    prompt = tokenizer()("2+2?", return_tensors="pt")["input_ids"]
    with running(app(model, route=route)) as port:
        for name, more in (("code", {}), ("text", {"gate_prior": {"text": 1}})):
            alone = model.specialist(name).generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
            _, answer = ask(port, body={"prompt": "2+2?", "max_tokens": 4, **more})
            assert answer["choices"][0]["text"] == tokenizer().decode(alone)
            _, streamed = ask(port, body={"prompt": "2+2?", "max_tokens": 4, "stream": True, **more})
            pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            assert "".join(p["choices"][0]["text"] for p in pieces if p["choices"]) == tokenizer().decode(alone)


def test_continuous_batching_goes_without_a_router():
    line = ["serve", "no/such/model", "--continuous-batching", "--router", "perplexity"]
    done = CliRunner().invoke(command_line, line)
    assert done.exit_code == 2
    assert "but got --router perplexity" in done.output


def test_the_command_tells_its_address(model, tmp_path, monkeypatch):
    folder, ran = str(tmp_path / "fused"), []
    model.save_pretrained(folder)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    monkeypatch.setattr(guard, "run", lambda app, host, port: ran.append((host, port)))
    done = CliRunner().invoke(command_line, ["serve", folder, "--port", "8123", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert f"Serving {folder!r} at http://localhost:8123/v1." in done.output
    assert ran == [("localhost", 8123)]
