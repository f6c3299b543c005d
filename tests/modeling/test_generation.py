"""Every way of generating text gives the tokens that the naive sum of specialists would give."""

import pytest
import torch
import transformers
from packaging import version
from transformers import DynamicCache, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.compat_ultrafuser import CACHE
from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, naive_gate_weights, naive_greedy, naive_logits, prompt
from tests.support.tiny import specialist


STEPS = 6


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def generate(fused, ids, **options):
    return fused.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def padded():
    """A batch whose second row is shorter, and its mask."""
    ids = prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


# ---------------------------------------------------------------------------------------------- greedy


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("mix", MIXES)
def test_greedy_decoding_takes_the_best_token_of_the_naive_sum(mix, fusion):
    specialists = MIXES[mix]()
    # longer than every window
    fused, ids = fuse(specialists, fusion=fusion), prompt(length=12)
    assert torch.equal(generate(fused, ids), naive_greedy(fused, specialists, ids, STEPS))


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
def test_every_kind_of_cache_and_none_give_the_same_tokens(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=12)
    expected = generate(fused, ids, use_cache=False)
    assert torch.equal(generate(fused, ids), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(fused, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(generate(fused, ids, prefill_chunk_size=5), expected)


@pytest.mark.grid
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_row_padded_on_the_left_gets_the_tokens_it_gets_alone(mix, cache):
    fused, (ids, mask) = fuse(MIXES[mix]()), padded()
    batch = generate(fused, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(batch[:1], generate(fused, ids[:1]))
    assert torch.equal(batch[1:, 5:], generate(fused, ids[1:, 5:]))


def test_the_logits_of_every_step_are_those_of_the_forward_pass(fused):
    ids = prompt()
    outputs = generate(fused, ids, return_dict_in_generate=True, output_logits=True)
    at_once = fused(outputs.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), at_once, rtol=1e-4, atol=2e-5)


def test_gate_weights_of_generated_text_are_those_of_the_forward_pass(fused):
    text = generate(fused, prompt())
    torch.testing.assert_close(fused.gate_weights(text), fused(text).gate_weights, rtol=0, atol=0)


def test_a_conversation_goes_on_from_its_cache(fused):
    first = generate(fused, prompt(batch=1), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(batch=1, length=5)], dim=-1)
    continued = generate(fused, longer, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(fused, longer, use_cache=False))


def test_generation_stops_where_any_specialist_would():
    ids = torch.tensor([[7, 8, 9]])
    specialists = {"text": specialist(), "code": specialist(layers=3)}
    first = generate(fuse(specialists, gate="uniform"), ids)[0, 3].item()
    specialists["code"].generation_config.eos_token_id = first
    fused = UltraFuserForCausalLM.from_specialists(specialists, gate="uniform")
    assert fused.generation_config.eos_token_id == sorted([2, first])
    assert generate(fused, ids).tolist() == [[7, 8, 9, first]]


class Listener:
    """What a streamer hears."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, tokens):
        self.heard += tokens.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token_in_order(fused):
    ids, listener = prompt(batch=1), Listener()
    assert generate(fused, ids, streamer=listener)[0].tolist() == listener.heard
    assert listener.ended


# ---------------------------------------------------------------------------------------------- beams and sampling


@pytest.mark.grid
@pytest.mark.parametrize("mix", ["one family", "windows", "soft caps"])
def test_beams_find_the_same_with_every_kind_of_cache(mix):
    fused, (ids, mask) = fuse(MIXES[mix]()), padded()
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    expected = generate(fused, ids, use_cache=False, **options)
    assert expected.shape == (4, 12 + STEPS)
    assert torch.equal(generate(fused, ids, **options), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static", **options), expected)


def test_beams_find_what_an_exhaustive_search_of_two_steps_finds(fused):
    ids = prompt(batch=1)
    with torch.no_grad():
        first = fused(ids).logits[0, -1].log_softmax(-1)
        continued = torch.cat([ids.expand(99, -1), torch.arange(99)[:, None]], dim=-1)
        total = first[:, None] + fused(continued).logits[:, -1].log_softmax(-1)
    best = divmod(total.argmax().item(), 99)
    # as many beams as tokens: nothing is pruned
    assert generate(fused, ids, num_beams=99, max_new_tokens=2)[0, -2:].tolist() == list(best)


@pytest.mark.parametrize("fusion", MIXTURES)
def test_sampling_draws_from_the_naive_sum(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    set_seed(1)
    actual = generate(fused, ids, do_sample=True, top_k=0, temperature=0.7)
    set_seed(1)
    expected = ids
    with torch.no_grad():
        for _ in range(STEPS):
            weights = naive_gate_weights(fused, specialists, expected)
            logits = naive_logits(fused, specialists, expected, weights)[:, -1]
            expected = torch.cat([expected, torch.multinomial((logits / 0.7).softmax(-1), 1)], dim=-1)
    assert torch.equal(actual, expected)


def test_sampling_several_continuations_does_not_depend_on_the_cache(fused):
    draws, ids = [], prompt()
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        set_seed(2)
        draws.append(generate(fused, ids, do_sample=True, num_return_sequences=3, **options))
    assert draws[0].shape[0] == 6
    assert len(draws[0].unique(dim=0)) > 2
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


# ---------------------------------------------------------------------------------------------- drafts


@pytest.mark.grid
@pytest.mark.parametrize("mix", ["one family", "three families", "scale factors"])
def test_every_specialist_is_a_draft_model_that_changes_no_token(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(batch=1)
    expected = generate(fused, ids, max_new_tokens=10)
    for name in fused.config.specialist_names:
        assert torch.equal(generate(fused, ids, max_new_tokens=10, assistant_model=fused.specialist(name)), expected)


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
def test_looking_up_drafts_in_the_prompt_changes_no_token(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(batch=1, length=4).repeat(1, 3)
    assert torch.equal(generate(fused, ids, prompt_lookup_num_tokens=3), generate(fused, ids))


def test_drafts_are_refused_where_a_specialist_cannot_go_back():
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    types = ["linear_attention", "full_attention"]
    hybrid = specialist("qwen3_5_text", layer_types=types, linear_value_head_dim=8, **linear)
    fused, ids = fuse({"text": specialist(), "code": hybrid}), prompt(batch=1)
    assert torch.equal(generate(fused, ids), generate(fused, ids, use_cache=False))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(fused, ids, prompt_lookup_num_tokens=3)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="older caches cannot leave out inner layers",
)
def test_drafts_work_with_layers_that_keep_no_keys_of_their_own():
    types = ["sliding_attention", "full_attention"] * 2
    small = {"sliding_window": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
    sharing = specialist(
        "gemma4_text", layers=4, num_kv_shared_layers=2, layer_types=types, global_head_dim=8, **small
    )
    fused, ids = fuse({"text": sharing, "code": specialist()}), prompt(batch=1, length=4).repeat(1, 3)
    expected = generate(fused, ids, use_cache=False)
    assert torch.equal(generate(fused, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(fused, ids, prompt_lookup_num_tokens=3), expected)


# ---------------------------------------------------------------------------------------------- continuous batching


def test_a_model_in_training_mode_generates_as_otherwise_or_says_what_to_do():
    """Checkpointed layers of older versions drop the cache there."""
    ids = prompt()
    fused = fuse(MIXES["one family"]())
    expected = generate(fused, ids)
    fused.gradient_checkpointing_enable()
    fused.train()
    if CACHE == "cache":
        assert torch.equal(generate(fused, ids), expected)
    else:
        with pytest.raises(ValueError, match=r"drop the cache.*`model.eval\(\)`"):
            generate(fused, ids)
    assert torch.equal(generate(fused.eval(), ids), expected)
