"""`ultrafuser check` says what fusing will say, before there is anything to fuse, from a few kilobytes."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import get_local_safetensors_metadata
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPTJConfig, MambaConfig, MoshiConfig, PhiConfig, set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
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
from tests.support.hub_server import COMMIT, TOKEN, HubServer, environment
from tests.support.stand_ins import (
    LLAMA_2_13B,
    LLAMA_3_8B,
    OF_MATH,
    QWEN_1_5B,
    QWEN_7B,
    llama_2_trio,
    many_words,
    qwen_trio,
    qwen_words,
    stand_in,
    write_holes,
)
from tests.support.tiny import specialist, tokenizer
from tests.support.versions import TESTED
from ultrafuser.check.checks import judge
from ultrafuser.check.findings import Judgement
from ultrafuser.check.metadata import parse
from ultrafuser.check.render import show
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


# ---------------------------------------------------------------------------------- published models, by their shapes


def test_qwen_specialists_of_one_size_fit_with_their_own_positions(folders):
    found = told(*qwen_trio(folders))
    assert found["verdict"] == "warning"
    assert said(found, "tokenizer", "fits") == "the same for all."
    assert said(found, "vocabulary", "fits") == "152064 rows in each."
    assert "the shortest, 4096 tokens" in said(found, "positions", "warning")
    assert "text 1000000.0, code 1000000.0, math 10000.0" in said(found, "RoPE", "fits")
    assert "they differ" in said(found, "chat template", "warning")
    assert said(found, "vLLM", "fits")
    assert found["merges"]["possible"] == []
    assert "`rope_parameters`" in found["merges"]["why_none"]
    # as their cards say
    assert found["numbers"]["parameters"]["text"] == pytest.approx(7.62e9, rel=0.01)
    # 2 bytes x keys and values x specialists x layers x heads x width
    assert found["numbers"]["cache_per_token"] == 2 * 2 * 3 * 28 * 4 * 128


def test_qwen_specialists_of_unequal_rows_and_sizes_fit(folders):
    words = qwen_words()
    text = stand_in(folders / "text", words, **QWEN_7B)
    math = stand_in(folders / "math", words, **QWEN_1_5B | OF_MATH)
    found = told(text, math)
    assert found["verdict"] == "warning"
    rows = said(found, "vocabulary", "fits")
    assert "cut to 151936 rows" in rows
    assert "text 152064, math 151936" in rows
    assert "no token uses the others" in rows
    assert "`num_attention_heads`" in said(found, "vLLM", "warning")
    # 2 bytes x rows x hidden size
    assert found["numbers"]["untying"] == {"math": 2 * 151936 * 1536}
    assert found["numbers"]["cache_per_token"] == 2 * 2 * 28 * (4 * 128 + 2 * 128)
    # as its card says, with its head counted twice
    assert found["numbers"]["parameters"]["math"] == pytest.approx(1.54e9 + 151936 * 1536, rel=0.01)
    assert found["numbers"]["cost_per_token"]["of"] == "text"


def test_llama_2_specialists_of_unequal_vocabularies_and_templates_fit(folders):
    # what is looked at does not depend on depth
    found = told(*llama_2_trio(folders, num_hidden_layers=2))
    assert found["verdict"] == "warning"
    rows = said(found, "vocabulary", "warning")
    assert "cut to 32000 rows, the smallest of text 32000, code 32016, math 32001" in rows
    assert "code ['<infill 0>', '<infill 1>', '<infill 2>'], math ['[PAD]']" in rows
    assert "they differ" in said(found, "chat template", "warning")
    assert "terms of its own" in said(found, "licence", "warning")
    assert "1000000.0" in said(found, "RoPE", "fits")
    assert said(found, "vLLM", "fits")


def test_specialists_of_one_shape_can_be_merged_too_and_of_padded_vocabularies_fused_only(folders):
    words = many_words(128000, [f"<|{k}|>" for k in range(256)])
    for name, rows in (("text", 128256), ("code", 128256), ("math", 128320)):
        stand_in(folders / name, words, **LLAMA_3_8B | {"vocab_size": rows, "num_hidden_layers": 2})
    same = told(folders / "text", folders / "code")
    assert (same["verdict"], same["merges"]["possible"]) == ("fits", ["average", "task_arithmetic", "ties", "dare"])
    padded = told(folders / "text", folders / "math")
    assert (padded["verdict"], padded["merges"]["possible"]) == ("fits", [])
    assert "(128320, 4096)" in padded["merges"]["why_none"]
    assert "cut to 128256 rows" in said(padded, "vocabulary", "fits")


def test_a_specialist_of_another_family_blocks(folders):
    qwen = stand_in(folders / "qwen", qwen_words(), **QWEN_7B)
    # the same words under other ids
    llama = stand_in(folders / "llama", many_words(32000, other=["<unk>"]), **LLAMA_2_13B | {"num_hidden_layers": 2})
    found = told(qwen, llama)
    assert found["verdict"] == "blocks"
    assert "'llama' uses a different tokenizer from 'qwen': 32000 ids differ" in said(found, "tokenizer", "blocks")


def test_a_folder_of_an_adapter_alone_blocks(folders):
    text = stand_in(folders / "text", qwen_words(), **QWEN_7B)
    adapter = folders / "adapter"
    adapter.mkdir()
    LoraConfig(base_model_name_or_path="Qwen/Qwen2.5-7B-Instruct", target_modules=["q_proj"]).save_pretrained(adapter)
    write_holes(adapter / "adapter_model.safetensors", {"q_proj.lora_A.weight": [16, 3584]})
    assert "'adapter'" in said(told(text, adapter), "model", "blocks")


def test_a_model_that_sees_and_has_no_text_part_of_its_own_blocks(folders):
    text = stand_in(folders / "text", qwen_words(), **QWEN_7B)
    fields = {key: value for key, value in QWEN_7B.items() if key != "model_type"}
    sees = stand_in(folders / "sees", qwen_words(), model_type="qwen2_5_vl", text_config=fields)
    assert "'sees' is a 'qwen2_5_vl' model" in said(told(text, sees), "model", "blocks")


def test_what_does_not_fit_into_memory_is_told(good, tmp_path, monkeypatch):
    code = small(tmp_path / "code")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    found = told(good, f"code={code}")
    assert "and 10.0 kB are free here" in said(found, "memory", "warning")
    assert found["numbers"]["disk"] > 10_000


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
    "no tokenizer": (bare, True, "its folder holds none"),
    "other dtype": (bfloat16, False, "one dtype"),
    "soft cap": (lambda f: small(f, "gemma2"), False, "soft cap"),
    "more rows": (lambda f: small(f, vocab_size=104), True, "cut to 99 rows"),
    "more rows, tied": (lambda f: small(f, vocab_size=104, tied=True), True, "cut to 99 rows"),
    "fewer rows": (lambda f: small(f, vocab_size=97), False, "every tokenizer can produce tokens beyond"),
    "fewer rows and tokens": (lambda f: small(f, vocab_size=97, words=tokenizer(97)), True, "other 97"),
    "padding beyond": (lambda f: with_ids(f, pad_token_id=103), True, "cut to 99"),
    "beginning beyond": (lambda f: with_ids(f, bos_token_id=103), True, "cut to 99"),
    "end beyond": (lambda f: with_ids(f, eos_token_id=[2, 103]), False, "end-of-text id"),
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


# ---------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_fused_model(tmp_path):
    set_seed(0)
    small(tmp_path / "text")
    small(tmp_path / "code", vocab_size=104, tied=True, layers=2)
    small(tmp_path / "math", hidden_size=32)
    folders = {name: tmp_path / name for name in ("text", "code", "math")}
    numbers = judge({n: (str(f), None) for n, f in folders.items()}).numbers
    model = UltraFuserForCausalLM.from_specialists(folders)
    model.save_pretrained(tmp_path / "fused")
    saved = sum(get_local_safetensors_metadata(tmp_path / "fused").parameter_count.values())
    assert numbers["disk"] == 4 * saved == numbers["memory"]["float32"]
    assert sum(numbers["parameters"].values()) == saved
    assert numbers["untying"] == {"code": 4 * 99 * 16}
    cache = model(torch.arange(3, 8)[None], use_cache=True).past_key_values
    assert numbers["cache_per_token"] == sum(4 * (y.keys.numel() + y.values.numel()) for y in cache.layers) / 5
    assert numbers["training"]["joint"] == trained(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fusion_gate" in name)
    assert numbers["training"]["gate"] == trained(model)
    with_lora = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in with_lora.named_parameters():
        parameter.requires_grad_("fusion_gate" in name or "lora_" in name)
    assert numbers["training"]["joint with LoRA"] == trained(with_lora)


def trained(model):
    """Bytes of parameters, gradients and moments after a step of AdamW."""
    model.train()
    model.zero_grad()
    ids = torch.arange(3, 8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1 or t.ndim]
    return sum(4 * t.numel() for t in held)


def test_a_token_costs_as_many_parameters_as_it_is_multiplied_by(good, tmp_path):
    numbers = judge({"text": (str(good), None), "code": (str(small(tmp_path / "code")), None)}).numbers
    model = AutoModelForCausalLM.from_pretrained(good)
    one = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert numbers["cost_per_token"]["times"] == round((2 * one + numbers["parameters"]["gate"]) / one, 2)


# ---------------------------------------------------------------------------------- command line


def test_the_exit_status_says_whether_they_fit(good, tmp_path):
    code = small(tmp_path / "code")
    shown = run(good, f"code={code}")
    assert shown.exit_code == 0
    assert "These models can be fused" in shown.stdout
    refused = run(good, tmp_path / "nothing")
    assert refused.exit_code == 2
    # in plain lines, the worst first
    assert refused.stdout.startswith("blocks  access  ")
    unusable = run(good, f"7b={code}")
    assert unusable.exit_code == 2
    assert "name becomes the name of a module" in unusable.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_what_was_found_is_shown_as_it_is(terminal):
    judgement = Judgement()
    judgement.note("vocabulary", "warning", "tokens such as ['[PAD]', ':smile:'] are lost.", "Do [bold]nothing.")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    show(judgement, console)
    shown = console.file.getvalue()
    assert "tokens such as ['[PAD]', ':smile:'] are lost." in shown
    assert "Do [bold]nothing." in shown


def test_json_holds_everything(good, tmp_path):
    shown = run(good, f"code={small(tmp_path / 'code')}", "--json")
    found = json.loads(shown.stdout)
    assert found["verdict"] == "warning"
    assert list(found["specialists"]) == [good.name, "code"]
    assert {"about", "status", "text", "fix"} == set(found["findings"][0])
    assert found["merges"]["possible"]
    assert found["numbers"]["disk"] > 0


def test_names_come_from_ids_and_revisions_are_taken_off(tmp_path):
    assert parse(["Qwen/Qwen2.5-7B-Instruct@v1", "code=lab/code", "other/Qwen2.5-7B-Instruct", "a/7b"]) == {
        "Qwen2_5_7B_Instruct": ("Qwen/Qwen2.5-7B-Instruct", "v1"),
        "code": ("lab/code", None),
        "Qwen2_5_7B_Instruct_2": ("other/Qwen2.5-7B-Instruct", None),
        "model_7b": ("a/7b", None),
    }
    odd = tmp_path / "a=b@c"
    odd.mkdir()
    assert parse([str(odd)]) == {"a_b_c": (str(odd), None)}


# ---------------------------------------------------------------------------------- the Hub


@pytest.mark.process
def test_three_seven_billion_models_are_checked_in_less_than_5_mb(folders):
    words = qwen_words()
    ids = {f"Qwen/{name}": folders / name for name in ("Text-7B", "Coder-7B", "Math-7B")}
    first = stand_in(folders / "Text-7B", words, shards=4, template="chat", **QWEN_7B)
    # as most repositories have it, but nothing writes it any more
    added = {str(i): {"content": t} for t, i in words.get_added_vocab().items()}
    path = first / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    for name in ("Coder-7B", "Math-7B"):
        shutil.copytree(first, folders / name, copy_function=os.link)
    assert (folders / "Text-7B" / "tokenizer.json").stat().st_size > 4e6
    with HubServer(ids) as server:
        code = "import sys; from ultrafuser.cli import main; sys.argv[0] = 'ultrafuser'; main()"
        command = [sys.executable, "-c", code, "check", *ids, "--json"]
        shown = subprocess.run(command, env=environment(server, folders / "home"), capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        found = json.loads(shown.stdout)
        assert server.sent < 5e6
        assert not [r for r in server.requests if r.startswith("GET") and r.endswith("tokenizer.json")]
    assert {s["commit"] for s in found["specialists"].values()} == {COMMIT}
    told = {f["text"] for f in found["findings"] if f["about"] == "tokenizer"}
    assert told == {"the same for all, told from the hashes of the files on the Hub."}
    assert found["merges"]["possible"]
    assert found["numbers"]["download"] == pytest.approx(3 * 2 * 7.62e9, rel=0.01)


# judges one list of arguments after another, each with a token or without, and prints what it found
DRIVER = """
import json, os, sys
from ultrafuser.check.findings import Judgement
from ultrafuser.check.checks import judge
from ultrafuser.check.metadata import parse
from ultrafuser.check.render import as_dict
for arguments, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    print(json.dumps(as_dict(judge(parse(arguments)))))
"""


@pytest.mark.process
def test_what_the_hub_denies_or_does_not_have_is_told(tmp_path):
    set_seed(0)
    for name in ("text", "code", "closed", "hidden", "older"):
        small(tmp_path / name)
    small(tmp_path / "different", words=tokenizer(swap="ab"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    ids = {f"lab/{path.name}": path for path in tmp_path.iterdir()}
    cases = {
        "fits": (["lab/text", "lab/code@main"], None),
        "gated": (["lab/text", "lab/closed"], None),
        "gated, wrong token": (["lab/text", "lab/closed"], "hf_wrong"),
        "gated, right token": (["lab/text", "lab/closed"], TOKEN),
        "private": (["lab/text", "lab/hidden"], None),
        "private, right token": (["lab/text", "lab/hidden"], TOKEN),
        "no such revision": (["lab/text", "lab/code@v9"], None),
        "different tokenizer": (["lab/text", "lab/different"], None),
        "adapter": (["lab/text", "lab/adapter"], None),
        "a folder and the Hub": ([str(tmp_path / "text"), "lab/code"], None),
    }
    with HubServer(ids, gated=["lab/closed"], private=["lab/hidden"]) as server:
        command = [sys.executable, "-c", DRIVER, json.dumps(list(cases.values()))]
        home = tmp_path / "home"
        shown = subprocess.run(command, env=environment(server, home), capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    found = dict(zip(cases, map(json.loads, shown.stdout.splitlines()), strict=True))
    blocks = {case: [f["text"] for f in j["findings"] if f["status"] == "blocks"] for case, j in found.items()}
    for case in ("fits", "gated, right token", "private, right token", "a folder and the Hub"):
        assert blocks[case] == [], case
    assert "'lab/closed') is gated, and no token was found" in blocks["gated"][0]
    assert "is gated, and a token was found" in blocks["gated, wrong token"][0]
    assert "private, and no token was found" in blocks["private"][0]
    assert "'lab/code', revision 'v9') has no such revision" in blocks["no such revision"][0]
    assert "2 ids differ, the first is 69" in blocks["different tokenizer"][0]
    assert "holds only an adapter" in blocks["adapter"][0]
    assert "open to your token" in str(found["gated, right token"]["findings"])
    for secret in (TOKEN, "hf_wrong"):
        assert secret not in shown.stdout + shown.stderr


def test_offline_what_has_been_downloaded_is_read(good, tmp_path, monkeypatch):
    repository = tmp_path / "models--lab--code"
    small(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = told(good, "lab/code")
    assert found["verdict"] == "warning"
    assert found["specialists"]["code"]["commit"] == COMMIT
    missing = told(good, "lab/text")
    assert missing["verdict"] == "blocks"
    assert "the Hub cannot be asked" in said(missing, "access", "blocks")
