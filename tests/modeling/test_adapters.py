"""Specialists that are LoRA adapters of one base say what they say merged, from one copy of the base."""

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaModel,
    StaticCache,
    TorchAoConfig,
    set_seed,
)

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.adapted import ADAPTERS, BASES, check_where_nothing_is_installed, make, pair
from tests.support.fusions import MIXTURES
from tests.support.mixes import prompt
from tests.support.tiny import specialist
from tests.support.versions import needs_peft_in_the_library
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist
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


@pytest.mark.grid
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


@torch.no_grad()
def test_a_base_whose_rows_see_each_other_is_refused_and_one_token_that_rounds_otherwise_is_not(sources, monkeypatch):
    plain, seen = LlamaModel.forward, []

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        seen.append(len(output.last_hidden_state))
        change(output.last_hidden_state)
        return output

    def one_token(states):
        states[0, 0] += 0.1 * len(states)

    def every_row(states):
        states += 0.1 * states.mean(0)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    change = one_token
    UltraFuserForCausalLM.from_specialists(sources)
    assert len({*seen}) > 1, "rows were not read together"
    change = every_row
    with pytest.raises(ValueError, match="LlamaModel does more with a row.*differ by .*%"):
        UltraFuserForCausalLM.from_specialists(sources)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
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


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
def test_a_padded_batch_gives_the_tokens_of_merged_specialists(way, models):
    batch, texts = padded(), []
    for model in models:
        set_seed(3)
        options = {key: value() if key == "past_key_values" else value for key, value in WAYS[way].items()}
        texts.append(model.generate(**batch, max_new_tokens=STEPS, **{"do_sample": False} | options))
    assert torch.equal(*texts)


@pytest.mark.e2e
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


@pytest.mark.e2e
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


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_folder_is_the_same_where_neither_our_packages_nor_peft_are(models, tmp_path):
    check_where_nothing_is_installed(models[0], prompt(), tmp_path)


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


@pytest.mark.grid
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


# ---------------------------------------------------------------------------------- where the base is


def base_of(sources):
    return json.loads(Path(sources["text"], "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_base_of_whole_models_is_refused(sources):
    with pytest.raises(ValueError, match="are whole models.*Leave it out"):
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
