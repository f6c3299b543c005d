"""Adapters of one base from folders and the Hub: checked, fused, or refused with the way out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.adapters_ultrafuser import AdaptedLinear
from modeling_ultrafuser.serving_ultrafuser import check_pageable, check_servable
from tests.support.adapted import ALL, make, pair
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.hub_server import COMMIT, HubServer, environment
from tests.support.mixes import prompt
from tests.support.tiny import specialist
from ultrafuser.cli.app import app
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.dropping import drop_specialists
from ultrafuser.decoding.stacking import stack


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def models(sources):
    return pair(sources)


# ---------------------------------------------------------------------------------------------- check and fuse


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_check_says_that_adapters_fit_and_what_they_take(sources):
    told = json.loads(run("check", *sources.values(), "--json").stdout)
    assert told["verdict"] != "blocks"
    [found] = [f for f in told["findings"] if f["about"] == "adapters"]
    assert found["status"] == "fits"
    assert "text 4, code 2, math 6" in found["text"]
    fused = UltraFuserForCausalLM.from_specialists(sources)
    size = sum(p.numel() * p.element_size() for p in fused.parameters())
    assert told["numbers"]["disk"] == size
    assert told["numbers"]["cost_per_token"]["rows"] == 3
    assert [f for f in told["findings"] if f["about"] == "vLLM"][0]["status"] == "warning"


def test_fuse_writes_a_folder_that_loads(sources, tmp_path):
    pairs = [f"{name}={folder}" for name, folder in sources.items()]
    done = run("fuse", *pairs, "--out", tmp_path / "fused")
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert model.config.adapters == {"rank": 6, "target_modules": sorted(ALL)}
    assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == 14
    took = json.loads((tmp_path / "fused" / "specialists.json").read_text())
    assert {n: t["source"] for n, t in took.items()} == sources


@pytest.mark.slow
def test_adapters_and_their_base_are_fetched_from_the_hub(sources, tmp_path):
    ids = {"lab/base": Path(sources["text"]).parent / "base"}
    for name, folder in sources.items():
        ids[f"lab/{name}"] = Path(rewritten(folder, tmp_path / name, base_model_name_or_path="lab/base"))
    arguments = ["fuse", *(f"{name}=lab/{name}" for name in sources), "--out", str(tmp_path / "fused")]
    with HubServer(ids) as server:
        command = [sys.executable, "-c", f"from ultrafuser.cli.app import app; app({arguments!r})"]
        env = environment(server, tmp_path / "home")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    own, ids = UltraFuserForCausalLM.from_specialists(sources), prompt()
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused")(ids).logits, own(ids).logits)
    took = json.loads((tmp_path / "fused" / "specialists.json").read_text())
    assert {t["commit"] for t in took.values()} == {COMMIT}


def test_the_tokenizer_of_an_adapter_without_one_is_its_bases(sources):
    base = Path(sources["text"]).parent / "base"
    words = common_tokenizer(sources)
    assert words.get_vocab() == common_tokenizer({"base": str(base)}).get_vocab()
    assert words.chat_template == CHAT_TEMPLATE


# ---------------------------------------------------------------------------------------------- refused


def rewritten(folder, tmp_path, tensors=None, **fields):
    """A copy of an adapter with other settings, or tensors."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | fields))
    if tensors is not None:
        state = load_file(copy / "adapter_model.safetensors")
        save_file(tensors(state), copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(copy)


NORM = "base_model.model.model.norm.lora_A.weight"


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


REFUSED = {
    "DoRA": ({"use_dora": True}, None, "use_dora=True"),
    "another kind": ({"peft_type": "IA3"}, None, "peft_type='IA3'"),
    "biases": ({"bias": "all"}, None, "bias='all'"),
    "other modules": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save=.*lm_head"),
    "a base that its start changed": ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa'"),
    "what is not known yet": ({"use_something_new": 1}, None, "use_something_new=1"),
    "no base": ({"base_model_name_or_path": None}, None, "`base_model_name_or_path` of .* is None"),
    "a part on a norm": ({}, lambda s: s | {NORM: torch.zeros(4, 32)}, "norm.lora_A"),
    "a part missing": ({}, lambda s: {k: t for k, t in s.items() if k != FIRST}, r"q_proj.*\[None, \(32, 4\)\]"),
    "another shape": ({}, lambda s: s | {FIRST: torch.zeros(4, 31)}, r"q_proj.*\(4, 31\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_more_or_less_than_lora_is_refused(case, sources, tmp_path):
    fields, tensors, said = REFUSED[case]
    changed = rewritten(sources["text"], tmp_path, tensors, **fields)
    with pytest.raises(ValueError, match=said):
        UltraFuserForCausalLM.from_specialists({"text": changed, "code": changed})
    told = json.loads(run("check", changed, changed, "--json").stdout)
    assert told["verdict"] == "blocks"


def test_a_pickle_is_not_read(sources, tmp_path):
    changed = Path(rewritten(sources["text"], tmp_path))
    (changed / "adapter_model.safetensors").rename(changed / "adapter_model.bin")
    with pytest.raises(OSError, match="Only the safetensors format is read"):
        UltraFuserForCausalLM.from_specialists({"text": str(changed), "code": sources["code"]})


MIXES = {
    "with a whole model": lambda text, folder: str(saved(folder / "other")),
    "with a model in memory": lambda text, folder: specialist("llama"),
    "of two bases": lambda text, folder: rewritten(text, folder, base_model_name_or_path=str(saved(folder / "other"))),
    "of two commits": lambda text, folder: rewritten(text, folder, revision="v2"),
}


def saved(folder):
    specialist("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MIXES)
def test_adapters_mixed_with_anything_else_are_refused_with_both_ways_out(kind, sources, tmp_path):
    mixed = {**sources, "more": MIXES[kind](sources["text"], tmp_path)}
    with pytest.raises(ValueError, match="'more'.*one base.*Fuse adapters of one base.*merge_and_unload"):
        UltraFuserForCausalLM.from_specialists(mixed)


@pytest.mark.parametrize("check", [check_servable, check_pageable])
def test_engines_that_lay_texts_end_to_end_are_refused_before_anything_starts(check, models):
    with pytest.raises(ValueError, match="end to end.*adapters of one base.*model.specialist"):
        check(models[0].config)


def test_what_runs_specialists_one_by_one_is_refused(models):
    with pytest.raises(ValueError, match="adapters of one base, which run in one pass already"):
        stack(models[0])
    with pytest.raises(ValueError, match="adapters of one base"):
        models[0].generate(prompt(batch=1), custom_generate=self_draft, max_new_tokens=2)
    with pytest.raises(ValueError, match="reads a token once for all of them. Leaving some out saves little"):
        models[0].generate(prompt(batch=1), custom_generate=drop_specialists, max_new_tokens=2)
    with pytest.raises(ValueError, match="rows of one batch.*cu_seq_lens_q"):
        models[0](prompt(), cu_seq_lens_q=torch.tensor([0, 9]))


# ---------------------------------------------------------------------------------- where the base is


def base_of(sources):
    return json.loads(Path(sources["text"], "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.e2e
def test_a_base_that_has_moved_can_be_said(sources, tmp_path):
    folders = {}
    for name in ("text", "code"):
        folders[name] = shutil.copytree(sources[name], tmp_path / name)
        file = folders[name] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": f"lab/{name}-4bit"}))
    with pytest.raises(ValueError, match="(?s)lab/code-4bit.*one base.*--base"):
        UltraFuserForCausalLM.from_specialists(folders)
    base = base_of(sources)
    fused = UltraFuserForCausalLM.from_specialists(folders, base=base)
    expected = UltraFuserForCausalLM.from_specialists({name: sources[name] for name in folders})
    ids = prompt()
    with torch.no_grad():
        assert torch.equal(fused(ids).logits, expected(ids).logits)
    found = CliRunner().invoke(app, ["check", *(f"{n}={f}" for n, f in folders.items()), "--base", str(base)])
    assert found.exit_code == 0, found.output
    given = [f"{n}={f}" for n, f in folders.items()]
    done = CliRunner().invoke(app, ["fuse", *given, "--base", str(base), "--out", str(tmp_path / "fused")])
    assert done.exit_code == 0, done.output
    referred = ["refer", str(tmp_path / "fused"), "--out", str(tmp_path / "refs"), "--base", str(base)]
    assert CliRunner().invoke(app, referred).exit_code == 0
    rebuilt = ["fuse", str(tmp_path / "refs" / "refs.yaml"), "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(app, rebuilt).exit_code == 0


@pytest.mark.parametrize("fault", ["quantised", "gone"])
def test_a_base_that_does_not_do_is_named_as_the_user_named_it(fault, sources, tmp_path):
    base = shutil.copytree(base_of(sources), tmp_path / "their-model")
    folders = {}
    for name in ("text", "code"):
        folders[name] = shutil.copytree(sources[name], tmp_path / name)
        file = folders[name] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    if fault == "gone":
        shutil.rmtree(base)
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
        )
    words = {"gone": "could not be read", "quantised": "with quantised weights"}[fault]
    with pytest.raises((ValueError, OSError), match=f"of 'text' and 'code', '.*their-model', .*{words}") as error:
        UltraFuserForCausalLM.from_specialists(folders)
    assert "`base=`" in str(error.value)
    assert "'base'" not in str(error.value)
    shown = CliRunner().invoke(app, ["check", *(f"{n}={f}" for n, f in folders.items())])
    assert shown.exit_code == 2
    assert "their-model" in shown.output
    assert "--base" in shown.output
    assert "'base'" not in shown.output
