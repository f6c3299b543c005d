"""`ultrafuser check` says what fusing does."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPTJConfig, MambaConfig, MoshiConfig, PhiConfig, set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM, plan_ultrafuser
from modeling_ultrafuser.plan_ultrafuser import Check
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from tests.support.checkpoints import (
    classifier,
    edit_config,
    encoder,
    encoder_decoder,
    gemma3,
    headless,
    inkling,
    llava,
    save,
    vision,
)
from tests.support.tiny import specialist, tokenizer
from tests.support.versions import TESTED
from ultrafuser.check.checks import judge
from ultrafuser.cli.app import app


@pytest.fixture
def folders(tmp_path):
    yield tmp_path
    # files of many gigabytes, if only by their length
    shutil.rmtree(tmp_path)


@pytest.fixture(autouse=True)
def _memory_for_all(monkeypatch):
    """What is said does not depend on the machine."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 50))


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def told(*arguments):
    """What the command says to programs; its exit status says the same."""
    shown = run(*arguments, "--json")
    found = json.loads(shown.stdout)
    assert shown.exit_code == (2 if found["verdict"] == "blocks" else 0)
    return found


def said(found, about, status):
    """The texts of findings about something, and a failure if there are none."""
    texts = [f["text"] for f in found["findings"] if (f["about"], f["status"]) == (about, status)]
    assert texts, found["findings"]
    return " ".join(texts)


# ---------------------------------------------------------------------------------- what fusing itself does


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    set_seed(0)
    return save(specialist(layers=1, hidden_size=16), tmp_path_factory.mktemp("good"))


def small(folder, family="llama", words=None, **fields):
    return save(specialist(family, **{"layers": 1, "hidden_size": 16, **fields}), folder, words)


def edited(folder, **fields):
    edit_config(small(folder), **fields)
    return folder


def only_files(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def with_file(folder, change):
    change(small(folder) / "model.safetensors")
    return folder


def lowercase():
    words = tokenizer()
    state = json.loads(words.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Lowercase"}
    words._tokenizer = type(words.backend_tokenizer).from_str(json.dumps(state))
    return words


def with_ids(folder, **ids):
    model = specialist(layers=1, hidden_size=16, vocab_size=104)
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    return save(model, folder)


def bare(folder):
    specialist(layers=1, hidden_size=16).save_pretrained(folder)
    return folder


def other(config):
    return lambda folder: save(AutoModelForCausalLM.from_config(config), folder)


def kind(build):
    def write(folder):
        build().save_pretrained(folder)
        return folder

    return write


def bfloat16(folder):
    return save(specialist(layers=1, hidden_size=16).bfloat16(), folder)


def adapted(folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small(folder)), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder)
    return folder


def fused(folder):
    return save(UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in ("text", "code")}), folder)


TINY = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1}


PHI = PhiConfig(**TINY, intermediate_size=16, num_attention_heads=2)


GPT_J = GPTJConfig(vocab_size=99, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=2)


# its embedding has a row more than its head, and its backbone no head at all
MOSHI = MoshiConfig(**TINY, num_attention_heads=2, ffn_dim=32, num_codebooks=2)


# a folder beside a good one, whether they can be fused, and what is said
CASES = {
    "equal": (small, True, ""),
    "no folder": (lambda f: f, False, "no folder here"),
    "empty folder": (only_files, False, "no config.json"),
    "a file": (lambda f: small(f) / "model.safetensors", False, "is the file"),
    "adapter": (lambda f: only_files(f, adapter_config='{"peft_type": "LORA"}'), False, "only an adapter"),
    "adapter beside a model": (adapted, False, "holds one plain model"),
    "quantised": (lambda f: edited(f, quantization_config={"quant_method": "awq"}), False, "quantised"),
    "remote code": (lambda f: edited(f, model_type="novel", auto_map={"AutoConfig": "x.Y"}), False, "never run here"),
    "unknown": (lambda f: edited(f, model_type="novel"), False, "is unknown"),
    "fused already": (fused, False, "itself a fused model"),
    "encoder": (kind(encoder), False, "decoder with a language-model head"),
    "vision alone": (kind(vision), False, "decoder with a language-model head"),
    "encoder-decoder": (kind(encoder_decoder), False, "decoder with a language-model head"),
    "headless": (kind(headless), False, "decoder with a language-model head"),
    "classifier": (kind(classifier), False, "decoder with a language-model head"),
    "no attention": (
        other(MambaConfig(**TINY, state_size=4)),
        False,
        "key-value cache" if TESTED else "prepare_inputs_for_generation",
    ),
    "head with a bias": (other(PHI), False, "must have no bias"),
    "another head with a bias": (other(GPT_J), False, "must have no bias"),
    "a row beyond the vocabulary": (other(MOSHI), False, "100 rows and its vocabulary 99"),
    "vision and text": (lambda f: save(gemma3(), f), True, "only the text part, 'gemma3_text'"),
    "vision around a llama": (lambda f: save(llava(), f), True, "only the text part, 'llama', is fused"),
    "pickle": (lambda f: with_file(f, lambda w: w.rename(w.with_name("pytorch_model.bin"))), False, "other formats"),
    "half a download": (lambda f: with_file(f, lambda w: os.truncate(w, 9000)), False, "a broken download"),
    "a cut header": (lambda f: with_file(f, lambda w: os.truncate(w, 90)), False, "not whole"),
    "rows misstated": (
        lambda f: edited(f, vocab_size=104),
        False,
        "(99, 16) in its files and (104, 16) by its config",
    ),
    "other tokenizer": (lambda f: small(f, words=tokenizer(swap="ab")), False, "2 ids differ, the first is 69"),
    "shorter tokenizer": (lambda f: small(f, words=tokenizer(90)), False, "9 ids differ"),
    "splitting otherwise": (lambda f: small(f, words=lowercase()), False, "splits text differently"),
    "no tokenizer": (bare, True, "its folder holds no tokenizer"),
    "other dtype": (bfloat16, False, "one dtype"),
    "soft cap": (lambda f: small(f, "gemma2"), False, "soft cap"),
    "more rows": (lambda f: small(f, vocab_size=104), True, "cut to 99 rows"),
    "more rows, tied": (lambda f: small(f, vocab_size=104, tied=True), True, "cut to 99 rows"),
    "fewer rows": (lambda f: small(f, vocab_size=97), False, "tokenizer can produce tokens beyond"),
    "fewer rows and tokens": (lambda f: small(f, vocab_size=97, words=tokenizer(97)), True, "other 97"),
    "padding beyond": (lambda f: with_ids(f, pad_token_id=103), True, "cut to 99"),
    "beginning beyond": (lambda f: with_ids(f, bos_token_id=103), True, "cut to 99"),
    "end beyond": (lambda f: with_ids(f, eos_token_id=[2, 103]), False, "of-text ids lie beyond"),
    "other end": (lambda f: small(f, eos_token_id=3), True, "the text ends at any"),
    "scaled logits": (lambda f: small(f, "granite", logits_scaling=4.0), True, "granite"),
    "other family": (lambda f: small(f, "gpt_neox"), True, "gpt_neox"),
    "asking for a loss of its router": (
        lambda f: small(f, "mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
        True,
        "no part that balances",
    ),
    "scaled states": (lambda f: save(inkling(), f), True, "inkling_text"),
    "padded rows": (lambda f: save(inkling(vocab_size=104, unpadded_vocab_size=99), f), True, "cut to 99 rows"),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES)
def test_check_says_what_fusing_does(case, good, tmp_path):
    build, fits, words = CASES[case]
    both = {"text": good, "other": build(tmp_path / "other")}
    assert_agreement(both, fits, words)


@pytest.mark.parametrize(
    ("case", "choices"), [("other dtype", {"dtype": "bfloat16"}), ("soft cap", {"fusion": "probabilities"})]
)
def test_check_takes_the_choices_of_fusing(case, choices, good, tmp_path):
    assert_agreement({"text": good, "other": CASES[case][0](tmp_path / "other")}, True, "", **choices)


def test_what_gates_cost_is_told_and_that_vllm_serves_those_that_look_back(good, tmp_path):
    words = (f"text={good}", f"other={small(tmp_path / 'other')}")
    found = told(*words, "--gate", "evidence")
    assert said(found, "vLLM", "fits")
    parameters = [f["numbers"]["parameters"]["gate"] for f in (found, told(*words, "--gate", "cross"))]
    assert parameters[0] > parameters[1]


def test_one_specialist_is_too_few(good):
    assert_agreement({"text": good}, False, "at least two")


def test_a_new_check_is_a_function_and_a_line_and_both_commands_run_it(good, tmp_path, monkeypatch):
    def check_depth(plan, name):
        layers = plan.configs[name].num_hidden_layers
        if layers > 1:
            raise Refusal(
                f"{name!r} has {layers} layers", "Specialists are shallow here", "Cut the rest off.", about="depth"
            )

    monkeypatch.setattr(plan_ultrafuser, "CHECKS", [*plan_ultrafuser.CHECKS, Check(check_depth, each="whole")])
    folders = {
        "text": good,
        "deep": small(tmp_path / "deep", layers=2),
        "deeper": small(tmp_path / "deeper", layers=3),
    }
    found = judge({name: (str(folder), None) for name, folder in folders.items()})
    assert [(f.status, f.text, f.fix) for f in found.findings if f.about == "depth"] == [
        ("blocks", f"'{name}' has {layers} layers. Specialists are shallow here.", "Cut the rest off.")
        for name, layers in (("deep", 2), ("deeper", 3))
    ]
    with pytest.raises(
        Refusal, match="^'deep' has 2 layers. Specialists are shallow here. Cut the rest off.$"
    ) as error:
        UltraFuserForCausalLM.from_specialists(folders)
    assert error.value.about == "depth"


def assert_agreement(folders, fits, words, **choices):
    found = judge({name: (str(folder), None) for name, folder in folders.items()}, **choices)
    assert (found.verdict != "blocks") == fits, found.findings
    assert any(words in f.text for f in found.findings), found.findings
    assert all(f.fix for f in found.findings if f.status != "fits"), found.findings
    try:
        UltraFuserForCausalLM.from_specialists(folders, **choices)
    except (ValueError, OSError, RuntimeError, SafetensorError):
        assert not fits
    else:
        assert fits
