"""A specialist had back is the model that went in."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.mixes import MIXES, fuse, prompt
from tests.support.tiny import specialist


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- cache and padding


def in_chunks(fused, ids, cache, sizes):
    logits = [fused(chunk, past_key_values=cache, use_cache=True).logits for chunk in ids.split(sizes, dim=-1)]
    return torch.cat(logits, dim=1)


# ---------------------------------------------------------------------------------------------- a specialist back


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_specialist_had_back_is_the_model_that_went_in(mix):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists), prompt()
    for name, model in specialists.items():
        back = fused.specialist(name)
        assert type(back) is type(model)
        assert_same(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mix", ["one family", "scale factors"])
def test_a_specialist_had_back_shares_the_fused_models_tensors(mix):
    fused = fuse(MIXES[mix]())
    start = 0
    for name in fused.config.specialist_names:
        back, backbone = fused.specialist(name), fused.model.specialists[name]
        theirs = [p.data_ptr() for p in back.base_model.parameters()]
        assert theirs == [p.data_ptr() for p in backbone.parameters()]
        head = back.get_output_embeddings().weight
        assert head.untyped_storage().data_ptr() == fused.lm_head.weight.untyped_storage().data_ptr()
        assert head.storage_offset() == start
        start += head.shape[1]


@pytest.mark.grid
@pytest.mark.parametrize("mix", ["one family", "soft caps", "scale factors", "experts"])
@torch.no_grad()
def test_a_specialist_had_back_can_be_saved_as_an_ordinary_model(mix, tmp_path):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists), prompt()
    for name, model in specialists.items():
        fused.specialist(name).save_pretrained(tmp_path / name)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(stock) is type(model)
        assert_same(stock(ids).logits, model(ids).logits)


@torch.no_grad()
def test_having_a_specialist_back_changes_nothing_in_the_fused_model(fused):
    ids = prompt()
    before, config = fused(ids).logits, fused.config.to_dict()
    fused.specialist("code")(ids)
    torch.testing.assert_close(fused(ids).logits, before, rtol=0, atol=0)
    assert fused.config.to_dict() == config


def test_an_unknown_specialist_is_refused_with_the_choices(fused):
    with pytest.raises(KeyError, match=r"no specialist 'law'.*'text', 'code', 'math'"):
        fused.specialist("law")


@torch.no_grad()
def test_models_in_memory_stay_their_owners(specialists):
    fused, ids = fuse(specialists), prompt()
    before = specialists["code"](ids).logits
    for parameter in fused.parameters():
        parameter.zero_()
    assert torch.equal(specialists["code"](ids).logits, before)


@torch.no_grad()
def test_what_a_backbone_computes_when_it_is_built_is_there_after_fusing_and_loading(tmp_path):
    # Falcon-H1 is never given these numbers by a checkpoint: loading must compute them
    shape = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    hybrid = specialist("falcon_h1", ssm_multipliers=[0.5, 2.0, 0.7, 3.0, 1.5], lm_head_multiplier=0.5, **shape)
    fused, ids = fuse({"text": hybrid, "code": specialist()}), prompt()
    assert_same(fused.specialist("text")(ids).logits, hybrid(ids).logits)
    fused.save_pretrained(tmp_path)
    again = UltraFuserForCausalLM.from_pretrained(tmp_path)
    assert_same(again(ids).logits, fused(ids).logits)


@torch.no_grad()
def test_a_family_with_a_width_for_each_layer_can_be_fused():
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "laurel_rank": 8}
    model = specialist("gemma3n_text", layers=4, sliding_window=4, num_kv_shared_layers=2, **layers, **small)
    fused, ids = fuse({"text": model, "code": model}), prompt()
    assert_same(fused(ids).logits, model(ids).logits)
    cache = DynamicCache(config=fused.config)
    assert_same(in_chunks(fused, ids, cache, [5, 1, 1, 1, 1]), model(ids).logits)


@torch.no_grad()
def test_rows_beyond_the_smallest_vocabulary_are_cut():
    specialists = {"text": specialist(vocab_size=99), "code": specialist(vocab_size=104, tied=True)}
    fused, ids = fuse(specialists, gate="uniform"), prompt()
    expected = sum(m(ids).logits[..., :99] for m in specialists.values()) / 2
    assert_same(fused(ids).logits, expected)


def test_a_gate_weight_that_rounds_to_nothing_has_a_gradient(specialists):
    fused = UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities", gate="constant")
    (numbers,) = fused.model.fusion_gate.parameters()
    numbers.data[0] = 200.0
    ids = prompt()
    fused(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters())
    with torch.no_grad():
        assert torch.allclose(fused(ids).logits, fused.specialist("text")(ids).logits.log_softmax(-1), atol=1e-5)
