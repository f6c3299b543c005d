"""Every way of generating text gives the tokens that the naive sum of specialists would give."""

import pytest
import torch
import transformers
from packaging import version
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.versions_ultrafuser import CACHE
from tests.support.mixes import MIXES, fuse, naive_gate_weights, naive_greedy, naive_logits, prompt
from tests.support.tiny import specialist
from tests.support.versions import TESTED


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


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
@pytest.mark.parametrize("mix", MIXES)
def test_greedy_decoding_takes_the_best_token_of_the_naive_sum(mix, fusion):
    specialists = MIXES[mix]()
    # longer than every window
    fused, ids = fuse(specialists, fusion=fusion), prompt(length=12)
    assert torch.equal(generate(fused, ids), naive_greedy(fused, specialists, ids, STEPS))


@pytest.mark.parametrize("mix", MIXES)
def test_every_kind_of_cache_and_none_give_the_same_tokens(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=12)
    expected = generate(fused, ids, use_cache=False)
    assert torch.equal(generate(fused, ids), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(fused, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(generate(fused, ids, prefill_chunk_size=5), expected)


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


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
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


@pytest.mark.parametrize("mix", ["one family", "three families", "scale factors"])
def test_every_specialist_is_a_draft_model_that_changes_no_token(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(batch=1)
    expected = generate(fused, ids, max_new_tokens=10)
    for name in fused.config.specialist_names:
        assert torch.equal(generate(fused, ids, max_new_tokens=10, assistant_model=fused.specialist(name)), expected)


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


# ---------------------------------------------------------------------------------------------- views of one prompt


def own_views():
    """One prompt in three specialists' words, of different length, padded on the left. (batch, specialists, seq)"""
    views = prompt(batch=6).view(2, 3, 9)
    masks = torch.ones_like(views)
    for row, lengths in enumerate([(0, 2, 5), (4, 0, 1)]):
        for k, padding in enumerate(lengths):
            views[row, k, :padding] = masks[row, k, :padding] = 0
    return views, masks


@torch.no_grad()
def naive_greedy_of_views(fused, specialists, views, masks, steps=STEPS):
    """One row and one specialist at a time, on unpadded tokens: no batch, no padding, no cache."""
    rows = []
    for row in range(len(views)):
        answer = []
        for _ in range(steps):
            hidden, logits = [], []
            for k, model in enumerate(specialists.values()):
                text = torch.cat([views[row, k, masks[row, k] == 1], torch.tensor(answer, dtype=torch.long)])[None]
                hidden.append(model.base_model(text).last_hidden_state[:, -1:])
                logits.append(model(text).logits[:, -1])
            weights = fused.model.fusion_gate(hidden).weights[:, 0]
            if fused.config.fusion == "probabilities":
                logits = [words.softmax(-1) for words in logits]
            answer.append(sum(weights[:, k : k + 1] * words for k, words in enumerate(logits)).argmax().item())
        rows.append(answer)
    return torch.tensor(rows)


WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


@pytest.mark.parametrize("mix", ["one family", "three families", "windows"])
def test_every_specialist_continues_its_own_view(mix):
    specialists = MIXES[mix]()
    fused, (views, masks) = fuse(specialists), own_views()
    expected = naive_greedy_of_views(fused, specialists, views, masks)
    # whichever view is passed as the ordinary input
    for main, options in enumerate(WAYS.values()):
        own = {"specialist_input_ids": views, "specialist_attention_mask": masks}
        text = generate(fused, views[:, main], attention_mask=masks[:, main], **own, **options)
        assert torch.equal(text[:, 9:], expected)


def test_views_work_for_mixed_probabilities_too(specialists):
    fused, (views, masks) = fuse(specialists, fusion="probabilities"), own_views()
    own = {"specialist_input_ids": views, "specialist_attention_mask": masks}
    text = generate(fused, views[:, 0], attention_mask=masks[:, 0], **own)
    assert torch.equal(text[:, 9:], naive_greedy_of_views(fused, specialists, views, masks))


@pytest.mark.parametrize("options", [*WAYS.values(), {"num_beams": 3}], ids=[*WAYS, "beams"])
def test_views_that_are_all_alike_change_nothing(options, fused):
    ids, mask = padded()
    views, masks = (t[:, None].repeat(1, 3, 1) for t in (ids, mask))
    plain = generate(fused, ids, attention_mask=mask, **options)
    viewed = generate(
        fused, ids, attention_mask=mask, specialist_input_ids=views, specialist_attention_mask=masks, **options
    )
    assert torch.equal(viewed, plain)


def test_beams_over_views_do_not_depend_on_the_cache(fused):
    views, masks = own_views()
    own = {"attention_mask": masks[:, 0], "specialist_input_ids": views, "specialist_attention_mask": masks}
    found = [generate(fused, views[:, 0], num_beams=3, **own, **options) for options in WAYS.values()]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_conversation_in_views_goes_on_from_its_cache(fused):
    views, masks = own_views()
    own = {"attention_mask": masks[:, 0], "specialist_input_ids": views, "specialist_attention_mask": masks}
    first = generate(fused, views[:, 0], return_dict_in_generate=True, **own)
    answer = first.sequences[:, None, 9:].expand(-1, 3, -1)
    # the next turn is worded differently for each specialist too
    views = torch.cat([views, answer, prompt(batch=6, length=4).view(2, 3, 4)], dim=-1)
    masks = torch.cat([masks, torch.ones(2, 3, STEPS + 4, dtype=torch.long)], dim=-1)
    own = {"attention_mask": masks[:, 0], "specialist_input_ids": views, "specialist_attention_mask": masks}
    continued = generate(fused, views[:, 0], past_key_values=first.past_key_values, **own)
    assert torch.equal(continued, generate(fused, views[:, 0], use_cache=False, **own))


def test_views_may_come_in_chunks(fused):
    views, masks = own_views()
    own = {"attention_mask": masks[:, 0], "specialist_input_ids": views, "specialist_attention_mask": masks}
    chunked = generate(fused, views[:, 0], prefill_chunk_size=4, **own)
    assert torch.equal(chunked, generate(fused, views[:, 0], **own))


def test_drafts_looked_up_in_the_prompt_change_no_token_with_views(fused):
    views = prompt(batch=3, length=4).view(1, 3, 4).repeat(1, 1, 3)
    own = {"specialist_input_ids": views, "specialist_attention_mask": torch.ones_like(views)}
    drafted = generate(fused, views[:, 0], prompt_lookup_num_tokens=3, **own)
    assert torch.equal(drafted, generate(fused, views[:, 0], **own))


def test_a_draft_model_changes_no_token_with_views(fused):
    views = prompt(batch=3).view(1, 3, 9)
    own = {"specialist_input_ids": views, "specialist_attention_mask": torch.ones_like(views)}
    drafted = generate(fused, views[:, 0], assistant_model=fused.specialist("text"), **own)
    assert torch.equal(drafted, generate(fused, views[:, 0], **own))


def test_views_of_another_shape_are_refused(fused):
    with pytest.raises(ValueError, match="one row per specialist"):
        generate(fused, prompt(), specialist_input_ids=prompt(batch=4).view(2, 2, 9))


# ---------------------------------------------------------------------------------------------- continuous batching


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mix", ["full attention", "windows"])
def test_continuous_batching_gives_every_prompt_the_tokens_it_gets_alone(mix, attention):
    specialists = {"text": specialist("llama", layers=2), "code": specialist("llama", layers=3, tied=True)}
    if mix == "windows":
        specialists = {
            "text": specialist("mistral", sliding_window=4),
            "code": specialist("llama", layers=3),
            "math": specialist("mistral", sliding_window=4),
        }
    fused = fuse(specialists, attn_implementation=attention)
    prompts = [prompt(batch=1, length=n)[0].tolist() for n in (12, 5, 9)]
    expected = [generate(fused, torch.tensor([p]))[0, len(p) :].tolist() for p in prompts]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # the default takes most of the machine's memory
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    answers = fused.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    assert [a.generated_tokens for a in answers.values()] == expected


@pytest.mark.parametrize("mix", ["one family", "windows"])
def test_continuous_batching_of_differing_attention_geometry_is_refused(mix):
    fused = fuse(MIXES[mix]())
    with pytest.raises(ValueError, match="blocks of one shape.*Use `generate`"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


def test_continuous_batching_of_differing_windows_is_refused():
    fused = fuse({f"window_{n}": specialist("mistral", layers=1, sliding_window=n) for n in (4, 6)})
    with pytest.raises(ValueError, match="one attention window.*'sliding_window': 6"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


UNPAGED = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "stablelm": {"num_key_value_heads": 4},
    **{"doge": {}, "nemotron": {}, "diffllama": {}},
    "deepseek_v3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"head_dim": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    },
}


# Bloom is not fused on older versions, and on newer ones the other two have pages
@pytest.mark.parametrize("family", [f for f in UNPAGED if TESTED or f not in ("bloom", "doge", "diffllama")])
def test_continuous_batching_of_a_family_without_pages_is_refused(family):
    fused = fuse({n: specialist(family, **UNPAGED[family]) for n in ("text", "code")})
    before = [s.config._attn_implementation for s in fused.model.specialists.values()]
    with pytest.raises(ValueError, match=f"keys and values in pages.*'text' \\('{family}'\\).*Use `generate`"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))
    assert [s.config._attn_implementation for s in fused.model.specialists.values()] == before
    assert generate(fused, prompt()).shape == (2, 9 + STEPS)


def test_the_family_without_pages_is_named_beside_one_that_has_them():
    fused = fuse(
        {"text": specialist("llama", **UNPAGED["stablelm"]), "code": specialist("stablelm", **UNPAGED["stablelm"])}
    )
    with pytest.raises(ValueError, match="pages.*'code' \\('stablelm'\\)"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))


def test_a_prompt_that_continuous_batching_could_not_answer_is_no_answer(monkeypatch):
    fused = fuse({"text": specialist("llama"), "code": specialist("llama", layers=3)})
    forward, steps = fused.forward, []

    def fail_in_the_third_step(*args, **kwargs):
        steps.append(len(steps))
        if len(steps) == 3:
            raise ArithmeticError("out of numbers")
        return forward(*args, **kwargs)

    monkeypatch.setattr(fused, "forward", fail_in_the_third_step)
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    with pytest.raises(RuntimeError, match="failed for 2 of 2 prompts: .*out of numbers"):
        fused.generate_batch(inputs=[[3, 4, 5], [6, 7]], generation_config=config, continuous_batching_config=small)


def test_an_answer_that_ends_by_itself_is_whole():
    fused = fuse({"text": specialist("llama"), "code": specialist("llama", layers=3)})
    plain = generate(fused, torch.tensor([[3, 4, 5]]))[0, 3:].tolist()
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=plain[1], pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    answers = fused.generate_batch([[3, 4, 5]], generation_config=config, continuous_batching_config=small)
    assert [a.generated_tokens for a in answers.values()] == [plain[: plain.index(plain[1]) + 1]]


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
