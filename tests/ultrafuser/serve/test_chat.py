"""A chat in the terminal: the answers are `generate`'s, the colours the gate's."""

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.support.conversations import CHAT_TEMPLATE
from tests.support.greedy import decoded, generated
from tests.support.tiny import tokenizer
from trainers import template_sandbox
from ultrafuser.cli.app import app
from ultrafuser.decoding.dropping import drop_specialists
from ultrafuser.reports.colours import assign
from ultrafuser.reports.terminal import speaker_style
from ultrafuser.route.prompt_route import PromptRoute
from ultrafuser.route.router_base import Router
from ultrafuser.serve.chat import Chat, Speech, speak


def chat(model, template=CHAT_TEMPLATE, *, max_new_tokens=12, route=None, **settings):
    console = Console(file=io.StringIO(), width=200, highlight=False, **settings)
    return Chat(model, tokenizer(chat_template=template), console, max_new_tokens=max_new_tokens, route=route)


def said(conversation):
    return conversation.console.file.getvalue()


def test_answers_are_those_of_generate_turn_after_turn(fused):
    conversation = chat(fused)
    conversation.run(["2+2?", "and 3?"])
    first = decoded(generated(fused, "<user>2+2?\n<assistant>")[0])
    second = decoded(generated(fused, f"<user>2+2?\n<assistant>{first}\n<user>and 3?\n<assistant>")[0])
    assert said(conversation) == f"{first}\n{second}\n"
    assert [m["content"] for m in conversation.messages] == ["2+2?", first, "and 3?", second]


def test_reset_forgets_and_quit_leaves(fused):
    conversation = chat(fused)
    conversation.run(["2+2?", "/reset", "2+2?", "/quit", "never answered"])
    first, second, rest = said(conversation).split("\n")
    assert first == second
    assert rest == ""


def test_every_token_has_the_colour_of_the_specialist_that_leads(fused):
    conversation = chat(fused, force_terminal=True, color_system="truecolor")
    conversation.run(["2+2?"])
    ids, weights = generated(fused, "<user>2+2?\n<assistant>")
    names = fused.config.specialist_names
    assert len({int(w.argmax()) for w in weights}) > 1, "a test of one colour only"
    expected = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False)
    for token, shares in zip(ids, weights, strict=True):
        colour = assign(names)[names[shares.argmax()]]
        expected.print(decoded([token]), style=speaker_style(colour, shares.max().item(), 3), end="", markup=False)
    expected.print()
    assert said(conversation) == expected.file.getvalue()


def test_dropping_shows_the_weights_of_each_token_though_it_drafts(fused):
    ids, found = tokenizer()("def read(self):", return_tensors="pt").input_ids, []
    for settings in ({}, {"custom_generate": drop_specialists, "keep": "top_p:1.0", "every": 50}):
        found.append(Speech(tokenizer(), lambda *_: None))
        speak(fused, ids, found[-1], 20, do_sample=False, **settings)
    plain, dropping = (torch.stack(speech.weights) for speech in found)
    torch.testing.assert_close(dropping, plain, atol=1e-5, rtol=1e-5)
    assert found[0].text == found[1].text


def test_who_gives_the_mean_weights_of_the_last_answer(fused):
    conversation = chat(fused)
    conversation.run(["/who", "2+2?", "/who", "/what"])
    lines = said(conversation).splitlines()
    _, weights = generated(fused, "<user>2+2?\n<assistant>")
    shares = [f"{w:.0%}" for w in weights.mean(0).tolist()]
    assert lines[0] == "Nobody has spoken yet."
    assert lines[2].split() == ["text", shares[0], "code", shares[1], "math", shares[2]]
    assert lines[3].startswith("There is no /what.")


def test_without_a_template_lines_are_continued_as_plain_text_and_it_says_so(fused):
    conversation = chat(fused, None)
    conversation.run(["2+2="])
    first, answer = said(conversation).splitlines()
    assert "no chat template" in first
    assert answer == decoded(generated(fused, "2+2=")[0])


def test_a_conversation_that_is_too_long_is_told_and_not_begun(fused):
    conversation = chat(fused)
    conversation.run(["9" * 300])
    assert "the model reads 256" in said(conversation)
    assert conversation.messages == []


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no users') }}", "cannot render this conversation: no users"),
        ("{{ messages[0].content.no.such }}", "cannot render"),
        ("{{ messages | map('upper') | list", "cannot render"),
        ("{% if false %}x{% endif %}", "renders nothing"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 3 s"),
    ],
)
def test_a_chat_template_that_fails_or_never_ends_is_told_in_a_sentence(template, words, fused, monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 3.0)
    conversation = chat(fused, template)
    assert conversation.answer("hello") == ""
    assert words in " ".join(said(conversation).split())


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_lookup_num_tokens": "x"},
        {"do_sample": True, "temperature": 1e-320},
        {"do_sample": True, "repetition_penalty": 1e-320},
        {"sequence_bias": {"a": 1}},
    ],
    ids=str,
)
def test_an_answer_that_generation_settings_make_impossible_is_told_in_a_sentence(settings, fused, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setattr(fused.generation_config, name, value, raising=False)
    conversation = chat(fused)
    assert conversation.answer("hello") == ""
    assert "What generation_config.json or config.json asks of an answer" in " ".join(said(conversation).split())


def test_an_interrupted_answer_is_kept_as_far_as_it_came(fused, monkeypatch):
    conversation = chat(fused)
    whole = decoded(generated(fused, "<user>2+2?\n<assistant>")[0])

    def interrupt(module, inputs, weights, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = fused.model.fusion_gate.register_forward_hook(interrupt)
    conversation.run(["2+2?"])
    hook.remove()
    assert conversation.messages[-1]["content"] == whole[:4]
    conversation.run(["/reset", "2+2?"])
    assert conversation.messages[-1]["content"] == whole


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_prompts_piped_in_are_answered_in_plain_text(template, fused, tmp_path):
    fused.save_pretrained(tmp_path)
    tokenizer(chat_template=template).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["chat", str(tmp_path), "--max-new-tokens", "12"], input="2+2?\n")
    assert result.exit_code == 0
    prompt = "<user>2+2?\n<assistant>" if template else "2+2?"
    assert result.stdout.splitlines()[-1] == decoded(generated(fused, prompt)[0])
    assert "\x1b" not in result.stdout


def test_a_folder_of_another_model_is_refused(specialists, tmp_path):
    specialists["text"].save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["chat", str(tmp_path)], input="2+2?\n")
    assert result.exit_code == 2
    assert "of type 'llama'" in result.output


def routed(model, *weights, alone=False):
    """A route that weighs every prompt alike."""
    router = Router({})
    router.prior = lambda prompts: torch.tensor([weights])
    return PromptRoute(model, tokenizer(), router, alone=alone)


def test_a_specialist_that_answers_alone_has_its_colour_and_its_own_tokens(fused):
    conversation = chat(fused, route=routed(fused, 0.2, 0.7, 0.1, alone=True))
    conversation.run(["2+2?", "/who"])
    prompt = tokenizer()("<user>2+2?\n<assistant>", return_tensors="pt")["input_ids"]
    expected = fused.specialist("code").generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    answer, who, _ = said(conversation).split("\n")
    assert answer == decoded(expected)
    assert who.split() == ["text", "0%", "code", "100%", "math", "0%"]


def test_a_router_of_the_chat_is_a_prior_on_the_gate(fused):
    conversation = chat(fused, route=routed(fused, 0.0, 0.0, 1.0))
    conversation.run(["2+2?", "/who"])
    assert said(conversation).splitlines()[1].split() == ["text", "0%", "code", "0%", "math", "100%"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--router", "no/such"], "no such router: 'no/such'"),
        (["--alone"], "but got no --router"),
        (["--alone", "--router", "perplexity", "--decoding", "dropping"], "but got --decoding dropping"),
        (["--fusion", "sum"], "Unknown fusion 'sum'"),
        (["--fusion", "contrast:0.5,0.1,art"], "there is no specialist 'art'"),
    ],
)
def test_routes_and_rules_of_the_command_line_that_cannot_be_are_refused(options, told, fused, tmp_path):
    fused.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["chat", str(tmp_path), *options], input="2+2?\n")
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
