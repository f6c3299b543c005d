"""Ways of decoding: exact ones give the plain way's tokens, the fastest of them is found, and those that cannot say why."""

import pytest
import torch
from typer.testing import CliRunner

from tests.support.mixes import MIXES, fuse, prompt
from tests.support.tiny import specialist, tokenizer
from ultrafuser.cli.app import app
from ultrafuser.decoding import choosing
from ultrafuser.decoding.choosing import COMPILED, EXACT, Speeds, decoder, speeds
from ultrafuser.decoding.stacking import StackedForCausalLM


NEW = 8


@pytest.fixture
def fused():
    return fuse({name: specialist(layers=1) for name in ("text", "code")})


def inputs(batch=1):
    ids = prompt(batch=batch, length=6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.grid
@pytest.mark.parametrize("way", [w for w in EXACT if w not in COMPILED])
def test_every_way_says_what_the_plain_one_says(fused, way):
    given = inputs() | {"max_new_tokens": NEW, "do_sample": False}
    model, options = decoder(fused, way, assistant=specialist(layers=1))
    assert torch.equal(model.generate(**given, **options), fused.generate(**given))


def test_all_exact_ways_but_those_that_compile_are_measured(fused):
    found = speeds(fused, inputs(), assistant=specialist(layers=1), max_new_tokens=NEW)
    assert list(found.tokens_per_second) == [w for w in EXACT if w not in COMPILED]
    assert min(found.tokens_per_second.values()) > 0
    assert not found.left_out


def test_ways_that_a_model_or_a_batch_cannot_go_are_left_out_with_the_reason():
    found = speeds(fuse(MIXES["windows"]()), inputs(batch=2), max_new_tokens=NEW)
    assert set(found.tokens_per_second) == {"plain", "self-drafting"}
    assert "has a window of" in found.left_out["stacked"]
    assert "batch_size = 1" in found.left_out["prompt lookup"]


def test_a_way_that_says_something_else_is_never_chosen(fused, monkeypatch):
    monkeypatch.setattr(choosing, "self_draft", lambda model, input_ids, *_, **__: input_ids)
    found = speeds(fused, inputs(), ways=("plain", "self-drafting"), max_new_tokens=NEW)
    assert found.fastest == "plain"
    assert "not those of the plain way" in found.left_out["self-drafting"]


def test_dropping_is_measured_where_it_is_asked_for_and_never_chosen(fused, monkeypatch):
    calls = []

    def drop(model, input_ids, *args, every=None, **kwargs):
        calls.append(every)
        return input_ids

    monkeypatch.setattr(choosing, "drop_specialists", drop)
    found = speeds(fused, inputs(), ways=("plain", "dropping"), dropping={"every": 4}, max_new_tokens=NEW)
    assert (list(found.inexact), list(found.tokens_per_second), found.fastest) == (["dropping"], ["plain"], "plain")
    assert set(calls) == {4}
    with pytest.raises(ValueError, match="`every` is the number of tokens"):
        decoder(fused, "dropping", dropping={"every": 0})
    with pytest.raises(ValueError, match="Unknown sparsifier"):
        decoder(fused, "dropping", dropping={"keep": "some"})


def test_dropping_is_a_way_with_settings(fused):
    given = inputs() | {"max_new_tokens": NEW, "do_sample": False}
    for keep, equal in (("none", True), ("top_k:1", False)):
        model, options = decoder(fused, "dropping", dropping={"keep": keep, "every": 100})
        assert torch.equal(model.generate(**given, **options), fused.generate(**given)) == equal


def test_the_fastest_is_taken_unless_one_is_asked_for(fused, monkeypatch):
    monkeypatch.setattr(choosing, "speeds", lambda *_, **__: Speeds({"plain": 1.0, "stacked": 2.0}))
    assert isinstance(decoder(fused, inputs=inputs())[0], StackedForCausalLM)
    assert decoder(fused, "plain", inputs=inputs()) == (fused, {})


def test_what_cannot_be_chosen_is_refused(fused):
    with pytest.raises(ValueError, match="one of .*'stacked'.* but got 'warp'"):
        decoder(fused, "warp")
    with pytest.raises(ValueError, match="small model of the same tokenizer"):
        decoder(fused, "assistant")
    with pytest.raises(ValueError, match="Give `inputs` to measure on"):
        decoder(fused)
    with pytest.raises(ValueError, match=r"but got \['warp'\]"):
        speeds(fused, inputs(), ways=("plain", "warp"))


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture
def folder(fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def run(*words, **kwargs):
    return CliRunner().invoke(app, [str(word) for word in words], **kwargs)


def test_speed_shows_specialists_and_ways_and_how_to_go_the_fastest(folder):
    done = run("speed", folder, "--new-tokens", 8, "--prompt", "one two", "--prompt", "one two three")
    assert done.exit_code == 0, done.output
    for row in (
        "text alone (llama)",
        "code alone (llama)",
        "fused, plain",
        "fused, stacked",
        "fused, dropping (other tokens)",
    ):
        assert row in done.output
    assert "Not prompt lookup: assisted generate is only supported for batch_size = 1" in done.output
    assert "decoder(model, '" in done.output


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("decoding", ["plain", "stacked", "auto"])
def test_a_chat_decodes_as_it_is_told(folder, decoding):
    said = run("chat", folder, "--max-new-tokens", 6, "--decoding", decoding, input="one two\n")
    assert said.exit_code == 0, said.output
    assert said.output == run("chat", folder, "--max-new-tokens", 6, input="one two\n").output


def test_a_chat_refuses_what_it_cannot_show_word_by_word(folder):
    refused = run("chat", folder, "--decoding", "self-drafting", input="one\n")
    assert refused.exit_code == 2
    assert "one of the ways ['plain', 'stacked', 'dropping', 'auto']" in refused.output


@pytest.mark.e2e
def test_a_chat_drops_specialists_as_it_is_told(folder):
    plain = run("chat", folder, "--max-new-tokens", 9, input="one two\n").output
    drop = ("chat", folder, "--max-new-tokens", 9, "--decoding", "dropping", "--every", 100)
    assert run(*drop, "--keep", "none", input="one two\n").output == plain
    said = run(*drop, "--keep", "top_k:1", input="one two\n/who\n")
    assert (said.exit_code, said.output) != (0, plain), said.output
    assert "Unknown sparsifier" in run(*drop, "--keep", "some", input="one two\n").output


def test_a_server_cannot_have_two_engines(folder):
    refused = run("serve", folder, "--continuous-batching", "--decoding", "dropping")
    assert refused.exit_code == 2
    assert "Leave one of them out" in refused.output


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--decoding", "no way"], "one of the ways ['plain', 'stacked', 'dropping', 'auto'], but got 'no way'"),
        (["--decoding", "dropping", "--keep", "nosuch"], "Unknown sparsifier 'nosuch'"),
        (["--keep", "top_k:1"], "--keep top_k:1 is of dropping, but answers are decoded in the way 'plain'"),
        (
            ["--every", "4", "--decoding", "auto"],
            "--every 4 is of dropping, but answers are decoded in the way 'auto'",
        ),
    ],
)
def test_settings_of_decoding_are_refused_before_a_model_is_read(command, options, told, tmp_path):
    refused = run(command, tmp_path / "no model", *options)
    assert refused.exit_code == 2
    assert told in " ".join(refused.output.split())


def test_a_measurement_of_speed_refuses_an_unknown_sparsifier_before_a_model_is_read(tmp_path):
    refused = run("speed", tmp_path / "no model", "--keep", "nosuch")
    assert refused.exit_code == 2
    assert "Unknown sparsifier 'nosuch'" in refused.output
