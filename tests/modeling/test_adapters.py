"""Specialists that are LoRA adapters of one base say what they say merged, from one copy of the base."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    StaticCache,
    TorchAoConfig,
    set_seed,
)
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.adapters_ultrafuser import AdaptedLinear, Rows
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE
from modeling_ultrafuser.serving_ultrafuser import check_pageable, check_servable_by_vllm
from tests.support.adapted import ADAPTERS, ALL, BASES, make, pair
from tests.support.conversations import CHAT_TEMPLATE, PAPER, changed, conversations, sft_trainer, weights
from tests.support.hub_server import COMMIT, HubServer, environment
from tests.support.mixes import prompt
from tests.support.tiny import specialist, stir_gate, tokenizer
from tests.support.versions import needs_peft_in_the_library
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from trainers.chunked import score_tokens
from trainers.gate_cache import CachedGateTrainer
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
from ultrafuser.cli.app import app
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.stacking import stack
from ultrafuser.evaluation.baselines import ensemble


STEPS = 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def models(sources):
    return pair(sources)


def padded():
    ids = prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("family", BASES)
@torch.no_grad()
def test_every_specialist_says_what_peft_says_of_its_adapter(family, tmp_path):
    sources = make(tmp_path, family)
    fused, ids = UltraFuserForCausalLM.from_specialists(sources), prompt()
    said = {"base": AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits}
    for name, folder in sources.items():
        expected = AutoPeftModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        close(fused.specialist(name)(ids).logits, expected)
        assert all((expected - other).abs().max() > 0.1 for other in said.values())
        said[name] = expected


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@pytest.mark.parametrize("family", BASES)
def test_a_fused_model_says_what_it_says_of_merged_specialists(family, fusion, tmp_path):
    adapted, merged = pair(make(tmp_path, family), fusion=fusion, dtype=torch.float64)
    ids, found = prompt(), []
    for model in (adapted, merged):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        gate = [p.grad for p in model.model.fusion_gate.parameters()]
        found.append([outputs.logits, outputs.gate_weights, outputs.loss, *gate])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_gradient_of_an_adapter_is_that_of_its_merged_weight(models):
    adapted, merged = models
    ids = prompt()
    layer = "layers.0.self_attn.q_proj"
    with torch.enable_grad():
        for model in models:
            model(ids, labels=ids).loss.backward()
    own = adapted.model.specialists["base"].get_submodule(layer)
    for k, name in enumerate(ADAPTERS):
        whole = merged.model.specialists[name].get_submodule(layer).weight.grad  # W + B^T A
        close(own.lora_A.grad[k], own.lora_B[k] @ whole)
        close(own.lora_B.grad[k], own.lora_A[k] @ whole.T)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_one_specialist_after_another(sources):
    adapted, merged = pair(sources, attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    ids = prompt()
    actual, expected = (model(ids, **asked) for model in (adapted, merged))
    for field in ("hidden_states", "attentions"):
        assert len(actual[field]) == len(expected[field])
    # the last of the hidden states are those that the head reads, summed over adapters
    pairs = [*zip(actual["hidden_states"][:-1], expected["hidden_states"][:-1], strict=True)]
    for one, other in [*pairs, *zip(actual["attentions"], expected["attentions"], strict=True)]:
        close(one, other)
    assert actual["hidden_states"][-1].shape[-1] == adapted.config.hidden_size
    assert [h is None for h in adapted(prompt(), output_hidden_states=[-1]).hidden_states] == [True] * 9 + [False]


@torch.no_grad()
def test_every_specialist_reads_the_prompt_in_its_own_words(models):
    ids = torch.randint(3, 99, (2, 3, 7))
    mask = torch.ones_like(ids)
    mask[:, 1, :3] = 0
    actual, expected = (m(ids[:, 0], specialist_input_ids=ids, specialist_attention_mask=mask) for m in models)
    close(actual.logits[:, 3:], expected.logits[:, 3:])
    views = {"specialist_input_ids": ids, "specialist_attention_mask": mask, "max_new_tokens": STEPS}
    texts = [m.generate(ids[:, 0], attention_mask=mask[:, 0], do_sample=False, **views) for m in models]
    assert torch.equal(*texts)


@torch.no_grad()
def test_the_base_itself_can_be_one_of_the_specialists(sources):
    base = str(Path(sources["text"]).parent / "base")
    fused = UltraFuserForCausalLM.from_specialists({"plain": base, **sources})
    ids = prompt()
    close(fused.specialist("plain")(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)
    adapters = [p for n, p in fused.named_parameters() if "lora_" in n]
    assert adapters
    assert not any(p[0].any() for p in adapters)


@torch.no_grad()
def test_another_gate_and_fusion_rule_share_the_base(models):
    ids = prompt()
    actual, expected = (ensemble(model, "uniform", "probabilities")(ids).logits for model in models)
    close(actual, expected)


@torch.no_grad()
def test_the_base_is_there_once(models):
    adapted, merged = models
    numbers = {n: p.numel() for n, p in adapted.named_parameters() if "fusion_gate" not in n}
    adapters = sum(size for name, size in numbers.items() if "lora_" in name)
    assert sum(numbers.values()) - adapters == merged.specialist("text").num_parameters()
    assert adapted.lm_head.weight.shape == (99, 32)


@torch.no_grad()
def test_in_sixteen_bits_the_difference_is_one_of_rounding(models):
    ids = prompt()
    exact = models[0](ids).logits
    own, merged = (model.to(torch.bfloat16)(ids).logits.float() for model in models)
    assert 0 < (own - exact).abs().mean() < 2 * (merged - exact).abs().mean()


# ---------------------------------------------------------------------------------------------- decoding

WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "a cache of the caller's": {"past_key_values": DynamicCache},
    "a static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "beams in a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "a prompt read in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_padded_batch_gives_the_tokens_of_merged_specialists(way, models):
    batch, texts = padded(), []
    for model in models:
        set_seed(3)
        options = {key: value() if key == "past_key_values" else value for key, value in WAYS[way].items()}
        texts.append(model.generate(**batch, max_new_tokens=STEPS, **{"do_sample": False} | options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("cache", [None, "static"])
def test_windows_and_soft_caps_give_the_tokens_of_merged_specialists(cache, tmp_path):
    batch, options = padded(), {"max_new_tokens": STEPS, "do_sample": False, "cache_implementation": cache}
    texts = [model.generate(**batch, **options) for model in pair(make(tmp_path, "gemma2"))]
    assert torch.equal(*texts)


def test_a_text_in_a_padded_batch_gets_the_tokens_that_it_gets_alone(models):
    fused, batch = models[0], padded()
    text = fused.generate(**batch, max_new_tokens=STEPS, do_sample=False)[1, 12:]
    alone = fused.generate(batch["input_ids"][1:, 5:], max_new_tokens=STEPS, do_sample=False)[0, 7:]
    assert torch.equal(text, alone)


@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_to_one_graph(models):
    fused, ids = models[0], prompt()
    torch._dynamo.reset()
    one_graph = torch.compile(fused, fullgraph=True, backend="eager")
    cache = StaticCache(config=fused.config, max_cache_len=16)
    fused(ids[:, :-1], past_key_values=cache, use_cache=True)
    close(one_graph(ids[:, -1:], past_key_values=cache, use_cache=True).logits, fused(ids).logits[:, -1:])


@pytest.mark.parametrize("how", ["a specialist", "the prompt"])
def test_drafts_change_no_token(how, models):
    fused, ids = models[0], prompt(batch=1, length=4).repeat(1, 3)
    drafts = (
        {"assistant_model": fused.specialist("code")} if how == "a specialist" else {"prompt_lookup_num_tokens": 3}
    )
    plain = fused.generate(ids, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(fused.generate(ids, max_new_tokens=STEPS, do_sample=False, **drafts), plain)


# ---------------------------------------------------------------------------------------------- saved

CLEAN = """
import sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser", "tests", "peft"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not any(info.values()), info
expected = load_file(sys.argv[1] + "/expected.safetensors")
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert torch.equal(model.generate(expected["ids"], max_new_tokens=8, do_sample=False), expected["text"])
"""


@pytest.mark.process
@torch.no_grad()
def test_a_saved_folder_is_the_same_where_neither_our_packages_nor_peft_are(models, tmp_path):
    fused, ids = models[0], prompt()
    fused.save_pretrained(tmp_path / "fused")
    text = fused.generate(ids, max_new_tokens=8, do_sample=False)
    save_file({"ids": ids, "logits": fused(ids).logits, "text": text}, tmp_path / "fused" / "expected.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "fused")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_a_loaded_model_is_the_saved_one_bit_by_bit(models, tmp_path):
    fused, ids = models[0], prompt()
    fused.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(ids).logits, fused(ids).logits)
    assert all(torch.equal(own, fused.state_dict()[key]) for key, own in again.state_dict().items())


def test_a_specialist_saved_is_a_stock_folder(models, tmp_path):
    models[0].specialist("math").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__module__.startswith("transformers.models.llama.")
    with torch.no_grad():
        ids = prompt()
        assert torch.equal(model(ids).logits, models[0].specialist("math")(ids).logits)


@pytest.mark.parametrize("kind", ["of fewer specialists", "of merged specialists", "without adapters"])
def test_a_checkpoint_of_other_specialists_is_refused(kind, models, sources, tmp_path):
    adapted, merged = models
    adapted.save_pretrained(tmp_path / "fused")
    other = {
        "of fewer specialists": lambda: remove_specialist(adapted, "code"),
        "of merged specialists": lambda: merged,
        "without adapters": lambda: adapted,
    }[kind]()
    state = {k: t for k, t in other.state_dict().items() if kind != "without adapters" or "lora_" not in k}
    save_file(state, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold the specialists that its configuration names"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused")


def test_more_rows_of_the_vocabulary_are_for_all_specialists(models, tmp_path):
    fused = models[0]
    fused.resize_token_embeddings(103)
    fused.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [c.vocab_size for c in again.config.specialists] == [103] * 3
    assert again(prompt()).logits.shape[-1] == 103


@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao"])
@torch.no_grad()
def test_a_quantised_base_keeps_its_adapters_as_they_are(kind, models, tmp_path):
    pytest.importorskip(kind)
    if kind == "bitsandbytes":
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        quantised = TorchAoConfig(Int8WeightOnlyConfig())
    fused, ids = models[0], prompt()
    fused.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    expected = {name: own for name, own in fused.named_parameters() if "lora_" in name}
    assert all(torch.equal(again.get_parameter(name), own) for name, own in expected.items())
    exact = fused(ids).logits
    assert 0 < (again(ids).logits - exact).abs().mean() < 0.1 * exact.abs().mean()
    with pytest.raises(ValueError, match="merged into the plain weights.*quantised.*quantization_config"):
        again.specialist("text")


# ---------------------------------------------------------------------------------------------- training

DATA = {name: Dataset.from_list(conversations(8)) for name in ADAPTERS}
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 6,
    "examples_per_domain": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def trained(model, folder, kind=GateTrainer, config=GateStageConfig, *, cache=None, peft_config=None, **settings):
    args = config(str(folder), **PAPER | SETTINGS | settings)
    extra = {} if cache is None else {"cache": folder / "cache"}
    extra |= {} if peft_config is None else {"peft_config": peft_config}
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    trainer = kind(model, args, DATA, processing_class=words, **extra)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trls_loss_is_the_models_own(models, tmp_path):
    trainer = sft_trainer(models[0], tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model.train(), dict(batch))
    own = models[0](**batch).loss
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_stage_one_trains_the_gate_alone_and_as_on_merged_specialists(fusion, sources, tmp_path):
    adapted, merged = pair(sources, fusion=fusion)
    before = weights(adapted)
    losses = [trained(model, tmp_path / str(i)) for i, model in enumerate((adapted, merged))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert changed(adapted, before) == {n for n in before if "fusion_gate" in n}
    for own, other in zip(*(m.model.fusion_gate.parameters() for m in (adapted, merged)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("gate", "fusion", "keep"),
    [
        ("mlp", "logits", "hidden"),
        ("mlp", "logits", "top"),
        ("mlp", "probabilities", "log_probs"),
        (DEFAULT_GATE, "logits", "hidden"),
        (DEFAULT_GATE, "probabilities", "hidden"),
    ],
)
def test_a_cache_gives_the_losses_of_stage_one(gate, fusion, keep, sources, tmp_path):
    plain, cached = (pair(sources, gate=gate, fusion=fusion)[0] for _ in range(2))
    cached.load_state_dict(plain.state_dict())
    losses = trained(plain, tmp_path / "plain")
    # of a vocabulary as small as this the likeliest tokens are all tokens
    kept = trained(cached, tmp_path / "cached", kind=lambda *a, **k: CachedGateTrainer(*a, keep=keep, **k), cache=True)
    assert kept == pytest.approx(losses, rel=1e-2 if keep == "top" else 1e-4)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_stage_two_trains_adapters_and_gate(fusion, sources, tmp_path):
    fused = pair(sources, fusion=fusion)[0]
    before = weights(fused)
    trained(fused, tmp_path, JointTrainer, JointStageConfig)
    assert changed(fused, before) == {n for n in before if "fusion_gate" in n or "lora_" in n}


def test_specialists_that_are_not_trained_keep_their_adapters(models, tmp_path):
    fused = models[0]
    before = weights(fused)
    trained(
        fused,
        tmp_path,
        JointTrainer,
        JointStageConfig,
        train_specialists=["code"],
        weight_decay=0.1,
        mix_reward="regret",
    )
    after = {n: t for n, t in fused.state_dict().items() if "lora_" in n}
    assert all(torch.equal(t[[0, 2]], before[n][[0, 2]]) for n, t in after.items())
    assert any(not torch.equal(t[1], before[n][1]) for n, t in after.items())


def test_what_an_adapter_does_not_touch_stays_untouched_in_training(models, tmp_path):
    trained(models[0], tmp_path, JointTrainer, JointStageConfig)
    layers = dict(models[0].model.specialists["base"].named_modules())
    # "code" has no adapter on the MLP, and rank 2 of the 6 that there is room for
    assert not layers["layers.0.mlp.up_proj"].lora_A[1].any()
    assert not layers["layers.0.mlp.up_proj"].lora_B[1].any()
    assert layers["layers.0.self_attn.q_proj"].lora_A[1, :2].any()
    assert not layers["layers.0.self_attn.q_proj"].lora_A[1, 2:].any()


@pytest.mark.parametrize("extra", ["peft_config", "one_specialist_at_a_time"])
def test_stage_two_of_adapters_takes_no_second_way_to_train(extra, models, tmp_path):
    options = {extra: LoraConfig(target_modules=["q_proj"]) if extra == "peft_config" else True}
    with pytest.raises(ValueError, match=f"adapters of one base.*`{extra}`.*Leave it out"):
        trained(models[0], tmp_path, JointTrainer, JointStageConfig, **options)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_scores_in_chunks_have_the_gradients_of_the_models_own_loss(fusion, sources):
    fused = pair(sources, fusion=fusion, dtype=torch.float64)[0]
    ids = prompt()
    parameters = [fused.lm_head.weight, fused.model.fusion_gate.score_weight]
    own = torch.autograd.grad(fused(ids, labels=ids).loss, parameters)
    outputs = fused.model(ids, use_cache=False)
    states, shares = outputs[0][:, :-1].flatten(0, 1), outputs.gate_weights[:, :-1].flatten(0, 1)
    scores, *_ = score_tokens(fused.config, states, shares, fused.lm_head.weight, ids[:, 1:].flatten(), chunk=5)
    chunked = torch.autograd.grad(-scores.mean(), parameters)
    for one, other in zip(chunked, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------- edited


@torch.no_grad()
def test_without_one_of_them_the_others_keep_their_adapters_and_shares(sources):
    fused, ids = pair(sources, gate="mlp")[0], prompt()
    less = remove_specialist(fused, "code")
    for name in ("text", "math"):
        assert torch.equal(less.specialist(name)(ids).logits, fused.specialist(name)(ids).logits)
    before = fused(ids).gate_weights[..., [0, 2]]
    close(less(ids).gate_weights, before / before.sum(-1, keepdim=True))


def test_one_more_is_refused_with_the_way_out(models, sources):
    with pytest.raises(ValueError, match="adapters of one base.*ultrafuser fuse"):
        add_specialist(models[0], "more", sources["text"])


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


@pytest.mark.process
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


HEAD = "base_model.model.lm_head.lora_A.weight"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "DoRA": ({"use_dora": True}, None, "use_dora=True"),
    "another kind": ({"peft_type": "IA3"}, None, "peft_type='IA3'"),
    "biases": ({"bias": "all"}, None, "bias='all'"),
    "other modules": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save=.*lm_head"),
    "a base that its start changed": ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa'"),
    "what is not known yet": ({"use_something_new": 1}, None, "use_something_new=1"),
    "no base": ({"base_model_name_or_path": None}, None, "`base_model_name_or_path` of .* is None"),
    "a part on the head": ({}, lambda s: s | {HEAD: torch.zeros(4, 32)}, "lm_head.lora_A"),
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
    with pytest.raises(ValueError, match="one base.*'more'.*Fuse adapters of one base.*merge_and_unload"):
        UltraFuserForCausalLM.from_specialists(mixed)


@pytest.mark.parametrize("check", [check_servable_by_vllm, check_pageable])
def test_engines_that_lay_texts_end_to_end_are_refused_before_anything_starts(check, models):
    with pytest.raises(ValueError, match="end to end.*adapters of one base.*model.specialist"):
        check(models[0].config)


def test_what_runs_specialists_one_by_one_is_refused(models):
    with pytest.raises(ValueError, match="adapters of one base, which run in one pass already"):
        stack(models[0])
    with pytest.raises(ValueError, match="adapters of one base"):
        models[0].generate(prompt(batch=1), custom_generate=self_draft, max_new_tokens=2)
    with pytest.raises(ValueError, match="rows of one batch.*cu_seq_lens_q"):
        models[0](prompt(), cu_seq_lens_q=torch.tensor([0, 9]))


# ---------------------------------------------------------------------------------- every linear layer that PEFT adapts


SMALL = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
FAMILIES = {
    # weights kept transposed
    "gpt2": (
        ["c_attn", "c_fc", "c_proj"],
        {"n_embd": 32, "n_layer": 2, "n_head": 4, **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)},
    ),
    # all tokens of a batch end to end
    "opt": (["q_proj", "fc1", "fc2"], {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    # a linear layer of its own class
    "falcon": (["query_key_value", "dense", "dense_h_to_4h"], {}),
    # experts that all tokens share, end to end
    "qwen2_moe": (
        ["q_proj", "up_proj", "shared_expert_gate"],
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_run_on_every_linear_layer_that_peft_adapts(family, tmp_path):
    targets, fields = FAMILIES[family]
    folders, merged = {}, {}
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **fields)).save_pretrained(
        tmp_path / "base"
    )
    for rank, name in enumerate(("text", "code"), start=3):
        config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        model.save_pretrained(tmp_path / name)
        folders[name], merged[name] = tmp_path / name, model.merge_and_unload().eval()
    fused, expected = (UltraFuserForCausalLM.from_specialists(given) for given in (folders, merged))
    stir_gate(fused)
    expected.model.fusion_gate.load_state_dict(fused.model.fusion_gate.state_dict())
    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.specialist("code")(ids).logits, merged["code"](ids).logits)
    texts = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (fused, expected)]
    assert torch.equal(*texts)
    # two batches of other sizes before their gradients, which run the layers once more
    fused.gradient_checkpointing_enable()
    fused.train()
    losses = [fused(part, labels=part).loss for part in (ids, ids[:1])]
    again = fused(ids, labels=ids).loss
    losses[0].backward()
    first = {name: p.grad.clone() for name, p in fused.named_parameters() if p.grad is not None}
    fused.zero_grad()
    again.backward()
    for name, p in fused.named_parameters():
        if name in first:
            torch.testing.assert_close(p.grad, first[name])


@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 5, 2, 8), (6, 3, 5, 4, 8), (30, 8)])
@pytest.mark.parametrize("subclass", [False, True])
def test_a_layer_adapts_inputs_of_any_rank(shape, subclass):
    class Own(nn.Linear):
        def forward(self, hidden_states):
            return hidden_states @ self.weight.T + self.bias

    set_seed(0)
    rows = Rows()
    rows.count = 6
    layer = AdaptedLinear((Own if subclass else nn.Linear)(8, 7), 3, 2, rows)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    hidden = torch.randn(shape)
    found = layer(hidden)
    merged = [layer.merged(k) for k in range(3)]
    assert all(type(m) is type(layer.base_layer) for m in merged)
    for row, (own, result) in enumerate(zip(hidden.view(6, -1, 8), found.view(6, -1, 7), strict=True)):
        torch.testing.assert_close(result, merged[row % 3](own))
    assert found.shape == (*shape[:-1], 7)


def test_tokens_that_do_not_tell_their_rows_are_refused():
    rows = Rows()
    rows.count = 6
    layer = AdaptedLinear(nn.Linear(8, 7), 3, 2, rows)
    for shape in ((29, 8), (4, 5, 8)):
        with pytest.raises(ValueError, match="does not tell the rows of 3 specialists apart"):
            layer(torch.randn(shape))


# ---------------------------------------------------------------------------------- where the base is


def base_of(sources):
    return json.loads(Path(sources["text"], "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_base_that_has_moved_can_be_said(sources, tmp_path):
    folders = {}
    for name in ("text", "code"):
        folders[name] = shutil.copytree(sources[name], tmp_path / name)
        file = folders[name] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": f"lab/{name}-4bit"}))
    with pytest.raises(ValueError, match="(?s)one base.*lab/code-4bit.*--base"):
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


def test_a_base_of_whole_models_is_refused(sources):
    with pytest.raises(ValueError, match="are whole models. Leave it out"):
        UltraFuserForCausalLM.from_specialists({"a": base_of(sources), "b": base_of(sources)}, base=base_of(sources))


@pytest.mark.parametrize("way", [pytest.param("add_adapter", marks=needs_peft_in_the_library), "peft"])
def test_a_model_in_memory_with_an_adapter_on_it_is_refused_for_that(way):
    model, config = specialist(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    if way == "peft":
        model = get_peft_model(model, config).get_base_model()
    else:
        model.add_adapter(config)
    with pytest.raises(ValueError, match=r"'x' \(LlamaForCausalLM\) has an adapter of PEFT on its layers"):
        UltraFuserForCausalLM.from_specialists({"x": model, "y": specialist()})
