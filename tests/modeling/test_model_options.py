"""What transformers' models can be asked for, a fused model can: compiling, resizing, hidden states, attentions."""

import pytest
import torch
from transformers import StaticCache

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


# ---------------------------------------------------------------------------------------------- the library's options


# one layer each: tracing is slow
SHALLOW = {
    "full attention": lambda: {
        "text": specialist("llama", layers=1),
        "code": specialist("llama", layers=1, tied=True),
    },
    "windows": lambda: {
        "text": specialist("mistral", layers=1, sliding_window=4),
        "code": specialist("qwen2", layers=1),
    },
}


@pytest.mark.e2e
@pytest.mark.parametrize(("mix", "fusion"), [("full attention", "logits"), ("windows", "probabilities")])
@torch.no_grad()
def test_the_forward_pass_compiles_to_one_graph(mix, fusion):
    fused, ids = fuse(SHALLOW[mix](), fusion=fusion), prompt()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    assert_same(compiled(ids, use_cache=False).logits, fused(ids, use_cache=False).logits)


@pytest.mark.e2e
@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_to_one_graph():
    fused, ids = fuse(SHALLOW["full attention"]()), prompt()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    cache = StaticCache(config=fused.config, max_cache_len=16)
    fused(ids[:, :-1], past_key_values=cache, use_cache=True)
    step = compiled(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert_same(step, fused(ids, use_cache=False).logits[:, -1:])


@pytest.mark.parametrize("rows", [120, 80])
@torch.no_grad()
def test_a_new_vocabulary_size_reaches_every_specialist_and_the_head(rows, fused):
    ids = torch.randint(3, min(rows, 99), (2, 9))
    before, kept = fused(ids).logits, min(rows, 99)
    fused.resize_token_embeddings(rows, mean_resizing=False)
    assert [s.get_input_embeddings().weight.shape[0] for s in fused.model.specialists.values()] == [rows] * 3
    assert fused.lm_head.weight.shape[0] == fused.config.vocab_size == fused.vocab_size == rows
    assert [c.vocab_size for c in fused.config.specialists] == [rows] * 3
    logits = fused(ids, labels=ids).logits
    assert logits.shape[-1] == rows
    assert_same(logits[..., :kept], before[..., :kept])


@torch.no_grad()
def test_a_new_token_can_be_read_after_growing(fused):
    fused.resize_token_embeddings(110, mean_resizing=False)
    assert fused(torch.full((1, 4), 109)).logits.isfinite().all()


@torch.no_grad()
def test_a_resized_model_survives_saving(fused, tmp_path):
    fused.resize_token_embeddings(110, mean_resizing=False)
    fused.save_pretrained(tmp_path)
    again, ids = UltraFuserForCausalLM.from_pretrained(tmp_path), prompt()
    torch.testing.assert_close(again(ids).logits, fused(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_hidden_states_are_every_specialists_own_one_after_another_and_last_the_fused(specialists):
    fused, ids = fuse(specialists), prompt()
    expected = [h for m in specialists.values() for h in m(ids, output_hidden_states=True).hidden_states]
    expected.append(fused.model(ids).last_hidden_state)
    assert_same(list(fused(ids, output_hidden_states=True).hidden_states), expected)
    assert fused(ids).hidden_states is None


@torch.no_grad()
def test_attentions_are_every_specialists_own_one_after_another(specialists):
    fused, ids = fuse(specialists, attn_implementation="eager"), prompt()
    for model in specialists.values():
        model.set_attn_implementation("eager")
    expected = [a for m in specialists.values() for a in m(ids, output_attentions=True).attentions]
    assert_same(list(fused(ids, output_attentions=True).attentions), expected)
    assert fused(ids).attentions is None


@torch.no_grad()
def test_a_tuple_holds_what_the_named_output_holds(fused):
    ids = prompt()
    named = fused(ids, labels=ids, use_cache=False)
    loss, logits, gate_weights = fused(ids, labels=ids, use_cache=False, return_dict=False)
    torch.testing.assert_close([loss, logits, gate_weights], [named.loss, named.logits, named.gate_weights])
    assert isinstance(fused.model(ids, return_dict=False), tuple)


@pytest.mark.grid
@pytest.mark.parametrize("mix", ["one family", "three families", "windows", "scale factors", "experts"])
@torch.no_grad()
def test_both_attention_implementations_agree_and_the_choice_reaches_every_specialist(mix):
    fused, ids = fuse(MIXES[mix](), attn_implementation="sdpa"), prompt(length=12)
    logits = {}
    for implementation in ("sdpa", "eager"):
        fused.set_attn_implementation(implementation)
        assert {s.config._attn_implementation for s in fused.model.specialists.values()} == {implementation}
        logits[implementation] = fused(ids).logits
    assert_same(logits["eager"], logits["sdpa"])


@torch.no_grad()
def test_the_wide_head_on_the_backbones_output_gives_the_logits(fused):
    ids = prompt()
    assert_same(fused.lm_head(fused.model(ids).last_hidden_state), fused(ids).logits)
