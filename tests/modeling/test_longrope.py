"""A rotation that changes with the length of the text: tokens are those without a cache."""

import pytest
import torch
from transformers import (
    GenerationConfig,
)

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.serving_ultrafuser import check_servable
from tests.support.tiny import VOCAB, specialist, stir_gate
from tests.support.versions import TESTED
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.dropping import drop_specialists


SWITCH, STEPS = 24, 12


def fuse(parts, **choices):
    fused = UltraFuserForCausalLM.from_specialists(parts, gate_hidden_size=16, **choices)
    stir_gate(fused)
    return unending(fused)


def unending(model):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(length=18, batch=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def generate(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "do_sample": False} | options
    return model.generate(ids, **options)


# ---------------------------------------------------------------------------------------------- longrope


ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
}


def longrope(family="phi3", **fields):
    rope = ROPE | ({"short_mscale": 1.0, "long_mscale": 1.3} if family == "phimoe" else {})
    sizes = {"num_local_experts": 2} if family == "phimoe" else {}
    more = {"original_max_position_embeddings": SWITCH} if family != "llama" else {}
    return unending(specialist(family, rope_parameters=rope, **more, **sizes, **fields))


def together(family="phi3"):
    return fuse({"text": specialist("llama", layers=1), "code": longrope(family)})


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_a_model_fused_with_itself_says_what_it_says_alone_where_its_rotation_changes(family):
    alone = longrope(family)
    fused = unending(UltraFuserForCausalLM.from_specialists({"a": alone, "b": alone}))
    expected = generate(alone, prompt(), use_cache=False)
    assert torch.equal(generate(fused, prompt()), expected)
    # not so on every version
    assert torch.equal(generate(alone, prompt()), expected) or not TESTED


WAYS = {
    "a cache": {},
    "a static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "looking up": {"prompt_lookup_num_tokens": 4},
    "self-drafting": {"custom_generate": self_draft, "num_drafts": 4},
    "dropping nobody": {"custom_generate": drop_specialists, "keep": "none", "every": 5},
}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("family", "length"),
    [("phi3", 18), ("phi3", SWITCH), ("phi3", SWITCH + 1), ("phimoe", 18), ("llama", 18)],
)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_without_a_cache_where_the_rotation_changes(way, family, length):
    fused, options = together(family), WAYS[way]
    ids = prompt(6).repeat(1, 5)[:, :length]
    plain = {k: v for k, v in options.items() if k == "num_beams"}
    assert torch.equal(generate(fused, ids, **options), generate(fused, ids, use_cache=False, **plain))


@pytest.mark.parametrize("name", ["text", "code"])
def test_drafts_of_a_specialist_end_where_the_rotation_changes(name):
    fused = together()
    expected = generate(fused, prompt(), use_cache=False)
    assistant = unending(fused.specialist(name))
    assert torch.equal(generate(fused, prompt(), assistant_model=assistant), expected)


@pytest.mark.parametrize("length", [18, 22])
def test_a_padded_batch_changes_its_rotation_when_its_longest_text_does(length):
    fused, ids = together(), prompt(length, batch=2)
    mask = torch.ones_like(ids)
    # every row is padded: the text is shorter than its row
    ids[:, :3] = mask[:, :3] = 0
    ids[1, :6] = mask[1, :6] = 0
    expected = generate(fused, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(generate(fused, ids, attention_mask=mask), expected)
    assert torch.equal(generate(fused, ids, attention_mask=mask, custom_generate=self_draft, num_drafts=4), expected)
    assert torch.equal(generate(fused, ids, attention_mask=mask, prefill_chunk_size=None), expected)


def test_views_of_one_prompt_change_their_rotation():
    fused, ids = together(), prompt()
    views = torch.stack([ids, ids.roll(1, -1)], dim=1)
    options = {"specialist_input_ids": views, "specialist_attention_mask": torch.ones_like(views)}
    options["specialist_attention_mask"][:, 1, :4] = 0
    assert torch.equal(generate(fused, ids, **options), generate(fused, ids, use_cache=False, **options))


def test_a_conversation_goes_on_from_its_cache_where_the_rotation_changes():
    fused = together()
    first = generate(fused, prompt(10), max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(14)], dim=-1)
    continued = generate(fused, longer, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(fused, longer, use_cache=False))


def test_a_text_that_cannot_be_read_anew_is_refused():
    with pytest.raises(
        ValueError, match=r"'code' are rotated by other factors .* than \[24\] tokens.*prefill_chunk_size"
    ):
        generate(together(), prompt(30), prefill_chunk_size=8)


def test_a_prompt_in_chunks_before_the_rotation_changes_is_read_as_one():
    fused = together()
    expected = generate(fused, prompt(20), max_new_tokens=3, use_cache=False)
    assert torch.equal(generate(fused, prompt(20), max_new_tokens=3, prefill_chunk_size=8), expected)


def test_engines_that_compute_a_key_once_refuse_it():
    fused = together()
    with pytest.raises(ValueError, match="Continuous batching computes each key once.*'code'.*24"):
        fused.generate_batch(inputs=[[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2))
    with pytest.raises(ValueError, match="vLLM's Transformers backend computes each key once.*'code'.*24"):
        check_servable(fused.config)
    # what cannot become longer is served
    fused.config.max_position_embeddings = SWITCH
    check_servable(fused.config)
