"""Specialists run in one pass say what they say one by one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.fusions import MIXTURES
from tests.support.mixes import fuse, prompt
from tests.support.tiny import specialist
from ultrafuser.decoding.compiling import compiled
from ultrafuser.decoding.stacking import stack, unstack


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64}
THREE = ("text", "code", "math")
SHAPES = {
    "llama": lambda: {n: specialist("llama") for n in THREE},
    "biases": lambda: {n: specialist("llama", attention_bias=True, mlp_bias=True) for n in THREE},
    "qwen2": lambda: {n: specialist("qwen2", rope_parameters=rope) for n, rope in zip(THREE, ROPES, strict=True)},
    "qwen3": lambda: {n: specialist("qwen3", layers=3) for n in THREE[:2]},
    "two families": lambda: {
        "text": specialist("llama"),
        "code": specialist("mistral", sliding_window=None, rope_parameters=ROPES[1]),
    },
}
ROPES = ({"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "default", "rope_theta": 9000.0}, YARN)
STEPS = 8


def pair(shape="llama", **options):
    """A fused model and the same stacked, of weights that a fresh model would not have in its norms and biases."""
    specialists = SHAPES[shape]()
    for model in specialists.values():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    fused = fuse(specialists, **options)
    return fused, stack(fused)


def generate(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def padded():
    ids = prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return {"inputs": ids, "attention_mask": mask}


# ---------------------------------------------------------------------------------------------- the same predictions


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_and_gate_weights_are_those_of_specialists_run_one_by_one(shape, fusion, attention):
    fused, stacked = pair(shape, fusion=fusion, attn_implementation=attention)
    ids = prompt()
    actual, expected = stacked(ids), fused(ids)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(actual.gate_weights, expected.gate_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stacked(ids, logits_to_keep=1).logits, actual.logits[:, -1:], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_in_sixteen_bits_the_difference_is_one_of_rounding():
    fused, _ = pair("qwen3")
    fused, ids = fused.to(torch.bfloat16).float(), prompt()
    exact = fused(ids).logits
    plain, stacked = (model(ids).logits.float() for model in (fused.to(torch.bfloat16), stack(fused)))
    assert 0 < (stacked - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


@torch.no_grad()
def test_the_loss_is_the_same():
    fused, stacked = pair()
    ids = prompt()
    torch.testing.assert_close(stacked(ids, labels=ids).loss, fused(ids, labels=ids).loss)


# ---------------------------------------------------------------------------------------------- the same tokens


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_decoding_gives_the_same_tokens_with_every_cache(shape, fusion):
    fused, stacked = pair(shape, fusion=fusion)
    ids = prompt()
    expected = generate(fused, ids)
    assert torch.equal(generate(stacked, ids), expected)
    assert torch.equal(generate(stacked, ids, use_cache=False), expected)
    assert torch.equal(generate(stacked, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(stacked, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(generate(stacked, ids, prefill_chunk_size=4), expected)


OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
    "beams": {"num_beams": 3},
}


@pytest.mark.grid
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("way", OPTIONS)
def test_a_padded_batch_gives_the_same_tokens(way, cache):
    fused, stacked = pair("qwen2")
    batch, texts = padded(), []
    for model in (fused, stacked):
        set_seed(3)
        texts.append(model.generate(**batch, max_new_tokens=STEPS, cache_implementation=cache, **OPTIONS[way]))
    assert torch.equal(*texts)


def test_drafts_looked_up_in_the_prompt_change_no_token():
    fused, stacked = pair()
    ids = prompt(batch=1, length=4).repeat(1, 3)
    assert torch.equal(generate(stacked, ids, prompt_lookup_num_tokens=3), generate(fused, ids))


def test_a_draft_model_changes_no_token():
    fused, stacked = pair()
    ids = prompt(batch=1)
    assert torch.equal(generate(stacked, ids, assistant_model=fused.specialist("code")), generate(fused, ids))


@pytest.mark.e2e
@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_to_one_graph():
    fused, stacked = pair()
    ids = prompt()
    torch._dynamo.reset()
    one_graph = torch.compile(stacked, fullgraph=True, backend="eager")
    cache = StaticCache(config=stacked.config, max_cache_len=16)
    stacked(ids[:, :-1], past_key_values=cache, use_cache=True)
    step = one_graph(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(step, fused(ids).logits[:, -1:], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "stacked"])
def test_compiled_decoding_gives_the_same_tokens(kind):
    fused, stacked = pair()
    model, ids = {"plain": fused, "stacked": stacked}[kind], prompt()
    torch._dynamo.reset()
    text = generate(model, ids, **compiled())
    assert hasattr(model, "_compiled_call")
    assert torch.equal(text, generate(fused, ids))


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.grid
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_unstacking_gives_every_tensor_back_bit_for_bit(shape):
    fused, stacked = pair(shape)
    back, ids = unstack(stacked), prompt()
    expected, actual = fused.state_dict(), back.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert torch.equal(back(ids).logits, fused(ids).logits)


def test_saving_gives_the_ordinary_folder_byte_for_byte(tmp_path):
    fused, stacked = pair("qwen2")
    fused.save_pretrained(tmp_path / "fused")
    stacked.save_pretrained(tmp_path / "stacked")
    files = {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()}
    assert "model.safetensors" in files
    assert {p.name: p.read_bytes() for p in (tmp_path / "stacked").iterdir()} == files
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked")
    assert type(again) is UltraFuserForCausalLM


def test_a_loaded_model_can_be_stacked(tmp_path):
    fused, stacked = pair("qwen2")
    fused.save_pretrained(tmp_path)
    ids = prompt()
    again = stack(UltraFuserForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(generate(again, ids), generate(stacked, ids))


def test_stacking_leaves_the_ordinary_model_as_it_was():
    fused, stacked = pair()
    ids = prompt()
    expected = generate(fused, ids)
    for parameter in stacked.model.specialists.layers.parameters():
        parameter.zero_()
    assert torch.equal(generate(fused, ids), expected)


# ---------------------------------------------------------------------------------------------- refused


REFUSED = {
    "of unequal depth": (("llama", {}), ("llama", {"layers": 3}), "layers.2.*absent"),
    "of unequal width": (("llama", {}), ("llama", {"hidden_size": 48}), r"embed_tokens.weight.*32\) and .*48\)"),
    "of other heads": (("llama", {}), ("llama", {"num_attention_heads": 8, "head_dim": 4}), "num_attention_heads"),
    "of another activation": (("llama", {}), ("llama", {"hidden_act": "gelu"}), "hidden_act.*silu and gelu"),
    "with biases and without": (("llama", {}), ("qwen2", {}), "q_proj.bias.*absent"),
    "with a window": (("llama", {}), ("mistral", {"sliding_window": 4}), "'code' has a window of 4"),
    "of another build": (("llama", {}), ("gpt_neox", {}), "'code' is 'gpt_neox'"),
    "with growing angles": (
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        "'dynamic'",
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", REFUSED)
def test_specialists_that_cannot_be_stacked_are_refused(case):
    (one, own), (other, fields), said = REFUSED[case]
    fused = fuse({"text": specialist(one, **own), "code": specialist(other, **fields)})
    with pytest.raises(ValueError, match=said):
        stack(fused)


def test_adapters_must_be_merged_first():
    fused, _ = pair()
    adapted = get_peft_model(fused, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"text\.layers\.0\.self_attn\.q_proj is adapted.*merge_and_unload"):
        stack(fused)
    merged, ids = adapted.merge_and_unload(), prompt()
    assert torch.equal(generate(stack(merged), ids), generate(merged, ids))


def test_what_needs_specialists_one_by_one_is_refused_with_the_way_out():
    _, stacked = pair()
    ids = prompt()
    for asked in ({"output_hidden_states": True}, {"specialist_input_ids": ids[:, None].expand(-1, 3, -1)}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))}.*unstack"):
            stacked(ids, **asked)
    with pytest.raises(ValueError, match="unstack"):
        stacked.specialist("code")
