"""`ultrafuser check` says what fusing will say, before there is anything to fuse, from a few kilobytes."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import get_local_safetensors_metadata
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, set_seed
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.plan_base_ultrafuser import Finding
from tests.support.checkpoints import (
    save,
)
from tests.support.hub_server import COMMIT
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
from tests.support.tiny import specialist
from ultrafuser.check.checks import Judgement, judge
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


@pytest.mark.slow
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


@pytest.mark.e2e
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


@pytest.mark.e2e
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


@pytest.mark.slow
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


@pytest.mark.e2e
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


@pytest.mark.e2e
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
    judgement.findings.append(
        Finding("vocabulary", "warning", "tokens such as ['[PAD]', ':smile:'] are lost.", "Do [bold]nothing.")
    )
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


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(good, tmp_path):
    missing = told(good, tmp_path / "no-such-folder")
    text = said(missing, "access", "blocks")
    assert "is no folder here" in text
    assert "the Hub cannot be asked" not in text


# ---------------------------------------------------------------------------------- the Hub


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
