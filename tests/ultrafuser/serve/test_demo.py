"""The demo: answers are `generate`'s, colours the gate's, and sliders steer one answer and leave the model alone."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import unescape

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import GateOutput
from tests.support import http_clients as http
from tests.support.browsers import in_browser
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.greedy import decoded, generated
from tests.support.http_clients import Visitor, running, said
from tests.support.tiny import specialist, stir_gate, tokenizer


pytest.importorskip("gradio")
from ultrafuser.serve.guard import Access, host_names  # noqa: E402


demo = pytest.importorskip("ultrafuser.serve.demo", reason="gradio is not installed", exc_type=ImportError)

NAMES = ["text", "code", "math"]
PROMPT = "<user>2+2?\n<assistant>"
ASKED = [{"role": "user", "content": "2+2?"}]
NASTY = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UltraFuserForCausalLM.from_specialists({n: specialist(layers=i + 1) for i, n in enumerate(NAMES)})
    stir_gate(model)
    # so that an answer is as long as it may be, and all of it to be seen
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


def answer(model, tokens=12, **steering):
    return list(demo.stream(model, tokenizer(chat_template=CHAT_TEMPLATE), ASKED, max_new_tokens=tokens, **steering))


@pytest.mark.e2e
def test_unsteered_answers_are_those_of_generate_with_the_gate_s_weights(model):
    pieces = answer(model, temperature=1.0, bias=(0.0, 0.0, 0.0))
    ids, weights = generated(model, PROMPT)
    assert "".join(text for text, _ in pieces) == decoded(ids)
    torch.testing.assert_close(torch.tensor([w for _, w in pieces]), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.e2e
def test_steering_follows_its_formula_and_ends_with_the_answer(model):
    ids = torch.arange(3, 30)[None]
    own = model.gate_weights(ids)
    bias = torch.tensor([0.5, -1.0, 2.0])
    with demo.steered(model.model.fusion_gate, 2.0, bias.tolist()):
        steered = model.gate_weights(ids)
        assert model(ids).logits.isfinite().all()
    scores = (own.log() / 2).clamp_min(demo.LEAST_SCORE) + bias
    torch.testing.assert_close(steered, scores.exp() / scores.exp().sum(-1, keepdim=True))
    assert torch.equal(model.gate_weights(ids), own)


@pytest.mark.e2e
def test_the_largest_bias_lifts_a_specialist_that_has_no_weight_at_all(model):
    sure = GateOutput(torch.tensor([[[1.0, 0.0, 0.0]]]))
    gate = torch.nn.Identity()
    gate.signed = None
    with demo.steered(gate, 0.1, bias=(0.0, 0.0, demo.LARGEST_BIAS)):
        assert gate(sure).weights[0, 0, 2] > 0.9999
    pieces = answer(model, bias=(0.0, demo.LARGEST_BIAS, 0.0))
    assert all(weights[1] > 0.99 for _, weights in pieces)
    # what code alone says
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [0, 1, 2]}
    alone = model.specialist("code").generate(ids, **settings)[0, ids.shape[-1] :]
    assert "".join(text for text, _ in pieces) == decoded(alone)


@pytest.mark.e2e
def test_an_answer_that_nobody_waits_for_is_stopped_and_the_next_is_its_own(model):
    calls = []
    hook = model.model.fusion_gate.register_forward_hook(lambda *_: calls.append(1))
    first = demo.stream(
        model, tokenizer(chat_template=CHAT_TEMPLATE), ASKED, max_new_tokens=200, bias=(0.0, 0.0, 30.0)
    )
    next(first)
    first.close()
    assert "".join(text for text, _ in answer(model)) == decoded(generated(model, PROMPT)[0])
    hook.remove()
    assert len(calls) < 200


@pytest.mark.e2e
def test_a_conversation_that_is_too_long_is_told(fused):
    with pytest.raises(ValueError, match="the model reads 256"):
        list(demo.stream(fused, tokenizer(), [{"role": "user", "content": "9" * 300}], max_new_tokens=5))


def app(model, template=CHAT_TEMPLATE, key=None):
    access = Access(host_names("127.0.0.1"), key=key)
    return demo.application(model, tokenizer(chat_template=template), "tiny & <odd>", access)


@pytest.fixture(scope="module")
def served(model):
    with running(app(model)) as port:
        yield f"http://127.0.0.1:{port}/"


@contextmanager
def opened(browser, url, *, width=1280, scheme="light"):
    """The page, which must neither complain nor ask for anything from elsewhere."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints, elsewhere = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url))
    page.goto(url)
    page.get_by_label("number input for Tokens at most").fill("12")
    yield page
    assert complaints == []
    assert elsewhere == []
    context.close()


def ask(page, text, answers=1):
    """Asks, and waits until an answer has all of its tokens."""
    page.locator("#prompt textarea").fill(text)
    page.locator("#prompt textarea").press("Enter")
    last = page.locator(".assistant").nth(answers - 1)
    page.wait_for_function(f"document.querySelectorAll('.assistant')[{answers - 1}]?.children.length === 12")
    return last


@pytest.mark.e2e
@in_browser
def test_a_message_gets_an_answer_coloured_by_who_speaks(served, browser, model):
    ids, weights = generated(model, PROMPT)
    assert len({int(w.argmax()) for w in weights}) > 1, "a test of one colour only"
    with opened(browser, served) as page:
        spans = ask(page, "2+2?").locator("span")
        assert page.locator(".user").inner_text() == "2+2?"
        assert "".join(spans.all_text_contents()) == decoded(ids)
        for span, own in zip(spans.all(), weights, strict=True):
            colour = demo.assign(NAMES)[NAMES[own.argmax()]]
            red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
            assert f"rgba({red}, {green}, {blue}" in span.evaluate("s => getComputedStyle(s).backgroundColor")
            told = dict(pair.rsplit(" ", 1) for pair in span.get_attribute("title").split(", "))
            assert {n: float(w) for n, w in told.items()} == pytest.approx(
                dict(zip(NAMES, own.tolist(), strict=True)), abs=0.006
            )
        means = [f"{name}: {mean:.0%}" for name, mean in zip(NAMES, weights.mean(0).tolist(), strict=True)]
        assert page.locator(".who > span").all_inner_texts() == means


@pytest.mark.e2e
@in_browser
def test_the_conversation_goes_on_until_it_is_cleared(served, browser, model):
    first = decoded(generated(model, PROMPT)[0])
    second = decoded(generated(model, f"{PROMPT}{first}\n<user>{NASTY}\n<assistant>")[0])
    with opened(browser, served) as page:
        ask(page, "2+2?")
        assert ask(page, NASTY, answers=2).text_content() == second
        assert page.locator(".user").nth(1).text_content() == NASTY
        assert page.locator("#conversation img").count() == 0
        assert page.title() == "tiny & <odd>: who speaks?"
        page.get_by_role("button", name="Clear").click()
        page.locator(".nothing").wait_for()
        assert ask(page, "2+2?").text_content() == first


@pytest.mark.e2e
@in_browser
def test_a_bias_far_to_the_right_makes_that_specialist_speak_and_the_next_answer_can_be_the_gate_s_again(
    served, browser, model
):
    with opened(browser, served) as page:
        slider = page.get_by_label("range slider for Bias of code")
        slider.press("End")
        spans = ask(page, "2+2?").locator("span")
        assert all(re.search(r"code 1\.00", span.get_attribute("title")) for span in spans.all())
        assert page.locator(".who > span").all_inner_texts() == ["text: 0%", "code: 100%", "math: 0%"]
        page.get_by_role("button", name="Clear").click()
        page.locator(".nothing").wait_for()
        page.get_by_label("number input for Bias of code").fill("0")
        assert ask(page, "2+2?").text_content() == decoded(generated(model, PROMPT)[0])


@pytest.mark.e2e
@in_browser
def test_stop_stops_and_the_next_answer_comes(served, browser, model):
    with opened(browser, served) as page:
        page.get_by_label("number input for Tokens at most").fill("240")
        page.locator("#prompt textarea").fill("2+2?")
        page.locator("#prompt textarea").press("Enter")
        page.wait_for_function("document.querySelectorAll('.assistant span').length > 2")
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Clear").click()
        page.locator(".nothing").wait_for()
        page.get_by_label("number input for Tokens at most").fill("12")
        assert ask(page, "2+2?").text_content() == decoded(generated(model, PROMPT)[0])


@pytest.mark.e2e
@in_browser
@pytest.mark.parametrize(("scheme", "ink", "paper"), [("light", "dark", "light"), ("dark", "light", "dark")])
def test_a_narrow_window_does_not_scroll_sideways_and_text_stays_readable(scheme, ink, paper, served, browser):
    with opened(browser, served, width=390, scheme=scheme) as page:
        span = ask(page, "2+2? " * 30).locator("span").first
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        bright = "c => c.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3"
        text = page.evaluate(bright, span.evaluate("s => getComputedStyle(s).color"))
        behind = page.evaluate(bright, page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (text > 128, behind > 128) == (ink == "light", paper == "light")


@pytest.mark.e2e
@in_browser
def test_without_a_chat_template_messages_are_continued_as_plain_text(browser, model):
    with running(app(model, None)) as port, opened(browser, f"http://127.0.0.1:{port}/") as page:
        assert "continued" in page.locator("#prompt textarea").get_attribute("placeholder")
        ask(page, "1+1=")
        assert ask(page, "2+2=", answers=2).text_content() == decoded(generated(model, "2+2=")[0])


# ----------------------------------------------------------------------------------------------- among strangers


@pytest.fixture(scope="module")
def port(served):
    return int(served.rstrip("/").rsplit(":", 1)[1])


@pytest.mark.e2e
def test_a_visitor_is_answered_as_generate_answers(port, model):
    assert unescape(said(Visitor(port).asks())) == decoded(generated(model, PROMPT)[0])


@pytest.mark.e2e
@pytest.mark.parametrize("path", ["upload", "run/predict", "api/predict", "component_server", "stream/x", "vibe-edit"])
def test_the_page_takes_no_uploads_and_has_no_other_ways_in(path, port):
    assert http.ask(port, f"/gradio_api/{path}", {})[0] == 404
    assert http.ask(port, f"/{path}", {})[0] == 404


@pytest.mark.e2e
@pytest.mark.parametrize(
    "path", ["gradio_api/file=/etc/passwd", "gradio_api/proxy=http://localhost", "monitoring", "docs"]
)
def test_the_page_shows_no_files_and_fetches_nothing_for_others(path, port):
    assert http.ask(port, f"/{path}")[0] == 404


@pytest.mark.e2e
def test_the_page_is_not_for_other_names_origins_or_large_bodies(port):
    assert http.ask(port, "/", headers={"Host": "evil.example"})[0] == 400
    assert http.ask(port, "/", headers={"Origin": "http://evil.example"})[0] == 403
    assert http.ask(port, "/gradio_api/queue/join", b" " * 2**21)[0] == 413


@pytest.mark.e2e
def test_with_a_key_the_browser_asks_for_it(model):
    with running(app(model, key="secret")) as port:
        assert http.ask(port, "/")[0] == 401
        assert http.ask(port, "/", headers={"Authorization": "Basic YW55OnNlY3JldA=="})[0] == 200


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("prompt", ["", "   ", None, "\x00", "\x1b[31m", "9" * 300, "ż" * 5])
def test_an_empty_or_odd_question_ends_in_words_and_the_next_is_answered(prompt, port, model, capfd):
    event = Visitor(port).asks(prompt)
    assert event["success"] or event["output"]["error"]
    assert unescape(said(Visitor(port).asks())) == decoded(generated(model, PROMPT)[0])
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fields", [{"most": value} for value in (None, "x", [], True)] + [{"bias": (None,) * 3}, {"temperature": "1"}]
)
@pytest.mark.parametrize("prompt", ["2+2?", 5, [1], {}])
def test_what_the_page_would_not_send_is_refused(prompt, fields, port, capfd):
    assert Visitor(port).join(prompt, **fields)[0] == 422
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"data": "\\ud800"}', b'{"data": [], "fn_index": 99, "session_hash": "x"}', b"[" * 10**5],
)
def test_a_press_of_no_button_is_refused(body, port, capfd):
    assert http.ask(port, "/gradio_api/queue/join", body)[0] == 422
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize("fields", [{"most": -5}, {"most": 1e9}, {"temperature": 0.0}, {"bias": (1e9, 0.0, 0.0)}])
def test_a_slider_beyond_its_ends_is_told(fields, port):
    event = Visitor(port).asks(**fields)
    assert not event["success"]
    assert re.search("(less|greater) than (min|max)imum", event["output"]["error"])


@pytest.mark.e2e
def test_thirty_who_never_listen_hold_nobody_up(port, model, monkeypatch):
    answering = []
    speak = demo.speak
    monkeypatch.setattr(demo, "speak", lambda *args, **more: (answering.append(1), speak(*args, **more))[1])
    for _ in range(30):
        assert Visitor(port).join(most=1024)[0] == 200
    assert unescape(said(Visitor(port).asks())) == decoded(generated(model, PROMPT)[0])
    assert len(answering) == 1


@pytest.mark.e2e
def test_more_questions_than_may_wait_are_refused(model, monkeypatch):
    monkeypatch.setattr(demo, "AT_ONCE", 1)
    monkeypatch.setattr(demo, "WAITING", 3)
    with running(app(model)) as port:
        answers = [Visitor(port).join()[0] for _ in range(8)]
        assert set(answers) == {200, 503}


@pytest.mark.e2e
def test_eight_visitors_at_once_are_answered_each_with_its_own_steering(port, model):
    names = list(range(8))
    biases = [(demo.LARGEST_BIAS * (i % 2), 0.0, 0.0) for i in names]
    expected = ["".join(text for text, _ in answer(model, bias=bias)) for bias in biases[:2]]
    with ThreadPoolExecutor(8) as pool:
        events = list(pool.map(lambda i: Visitor(port).asks(bias=biases[i]), names))
    assert [unescape(said(event)) for event in events] == expected * 4
    assert expected[0] != expected[1]


def test_the_specialist_with_the_largest_weight_of_either_sign_leads():
    html = demo.talk([[("4", [1.0, 0.5, -1.5])]], {"large": "#000001", "tuned": "#000002", "old": "#000003"})
    assert "background:#000003" in html
