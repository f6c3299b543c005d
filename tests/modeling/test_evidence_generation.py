"""Gates that read evidence, in every way to generate: caches, padding, beams, drafts, packed rows and views."""

import copy

import pytest
import torch
from transformers import DynamicCache, set_seed

from modeling_ultrafuser.evidence_ultrafuser import KEPT, EvidenceLayer
from modeling_ultrafuser.gate_base_ultrafuser import Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from tests.support.mixes import MIXES, fuse, naive_greedy, prompt, textbook
from tests.support.tiny import specialist
from ultrafuser.decoding.drafting import self_draft


READERS = [name for name, gate in GATES.items() if Reads.PAST in gate.reads]


STEPS = 8


CLOSE = {"rtol": 1e-4, "atol": 2e-5}


# sums of many log-probabilities, which a gate multiplies
NEAR = {"rtol": 1e-3, "atol": 1e-4}


every_reader = pytest.mark.parametrize("gate", READERS)


either_way = pytest.mark.parametrize(("gate", "fusion"), [("evidence", "logits"), ("posterior", "probabilities")])


@pytest.fixture
def specialists():
    return MIXES["one family"]()


def generate(fused, ids, **options):
    return fused.generate(ids, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def padded():
    ids = prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.grid
@either_way
@pytest.mark.parametrize("mix", ["one family", "windows"])
def test_every_kind_of_cache_and_none_give_the_naive_tokens(mix, gate, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt(length=12)
    expected = naive_greedy(fused, specialists, ids, STEPS)
    assert torch.equal(generate(fused, ids, use_cache=False), expected)
    assert torch.equal(generate(fused, ids), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(fused, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(generate(fused, ids, prefill_chunk_size=5), expected)
    assert torch.equal(generate(fused, ids, prefill_chunk_size=5, cache_implementation="static"), expected)


@every_reader
@torch.no_grad()
def test_a_text_read_in_parts_has_the_weights_of_one_read_whole(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt(length=30)
    whole, cache, parts = fused(ids), None, []
    for part in ids.split([1, 7, 1, 1, 12, 8], dim=1):
        outputs = fused(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs)
    torch.testing.assert_close(torch.cat([o.gate_weights for o in parts], 1), whole.gate_weights, **CLOSE)
    torch.testing.assert_close(torch.cat([o.logits for o in parts], 1), whole.logits, **NEAR)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("gate", "fusion", "calibrated"),
    [
        ("evidence", "logits", False),
        ("evidence", "logits", True),
        ("evidence", "probabilities", True),
        ("posterior", "probabilities", False),
    ],
)
@pytest.mark.parametrize("mix", ["one family", "soft caps"])
@torch.no_grad()
def test_a_step_that_computes_each_specialists_logits_once_says_what_a_whole_pass_says(mix, gate, fusion, calibrated):
    # what the last logits of a step sum up to is what the next step asks for
    fused, ids = fuse(MIXES[mix](), gate=gate, fusion=fusion, gate_calibration=calibrated), prompt(length=20)
    if calibrated:
        fused.model.fusion_gate.skip_evidence_weight *= 0.1
    whole, cache = fused(ids), None
    for end, part in zip((9, *range(10, 21)), ids.split([9, *[1] * 11], dim=1), strict=True):
        outputs = fused(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
        assert cache.layers[-1].normalised
        torch.testing.assert_close(outputs.logits[:, 0], whole.logits[:, end - 1], **NEAR)
        torch.testing.assert_close(outputs.gate_weights[:, -1], whole.gate_weights[:, end - 1], **NEAR)
    if not any(cache.is_sliding):
        # once it has gone back, what is kept is of another token
        cache.crop(-1)
        outputs = fused(ids[:, -1:], past_key_values=cache, logits_to_keep=1)
        torch.testing.assert_close(outputs.gate_weights[:, -1], whole.gate_weights[:, -1], **NEAR)


@pytest.mark.grid
@every_reader
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_row_padded_on_the_left_gets_what_it_gets_alone(cache, gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    batch = generate(fused, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(batch[:1], generate(fused, ids[:1]))
    assert torch.equal(batch[1:, 5:], generate(fused, ids[1:, 5:]))


@every_reader
@torch.no_grad()
def test_padding_is_no_evidence_on_either_side(gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    alone = fused(ids[1:, 5:]).gate_weights
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": positions}):
        torch.testing.assert_close(fused(ids, attention_mask=mask, **given).gate_weights[1:, 5:], alone, **CLOSE)
    right, shown = ids.roll(-5, dims=1), mask.roll(-5, dims=1)
    torch.testing.assert_close(fused(right, attention_mask=shown).gate_weights[1:, :7], alone, **CLOSE)
    # positions that count padding, too: the mask alone tells
    outputs = fused(ids, attention_mask=mask, position_ids=torch.arange(12)[None])
    assert torch.equal(
        outputs.gate_weights[1, 4].argsort(), fused(ids, attention_mask=mask).gate_weights[1, 4].argsort()
    )


@every_reader
def test_beams_find_the_same_with_every_kind_of_cache(gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    expected = generate(fused, ids, use_cache=False, **options)
    assert torch.equal(generate(fused, ids, **options), expected)
    assert torch.equal(generate(fused, ids, cache_implementation="static", **options), expected)


@every_reader
def test_sampling_does_not_depend_on_the_cache(gate, specialists):
    fused, ids, draws = fuse(specialists, gate=gate), prompt(), []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        set_seed(2)
        draws.append(generate(fused, ids, do_sample=True, num_return_sequences=3, **options))
    assert len(draws[0].unique(dim=0)) > 2
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.e2e
@either_way
def test_drafts_of_every_kind_change_no_token(gate, fusion, specialists):
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt(batch=1, length=6).repeat(1, 2)
    greedy = {"max_new_tokens": 24}
    expected = generate(fused, ids, **greedy)
    for name in fused.config.specialist_names:
        assert torch.equal(generate(fused, ids, assistant_model=fused.specialist(name), **greedy), expected)
    assert torch.equal(generate(fused, ids, prompt_lookup_num_tokens=3, **greedy), expected)
    for drafts in (4, 30):
        assert torch.equal(generate(fused, ids, custom_generate=self_draft, num_drafts=drafts, **greedy), expected)


@every_reader
def test_self_drafting_sees_no_padding(gate, specialists):
    fused, (ids, mask) = fuse(specialists, gate=gate), padded()
    drafted = generate(fused, ids, attention_mask=mask, custom_generate=self_draft)
    assert torch.equal(drafted, generate(fused, ids, attention_mask=mask))


@every_reader
def test_a_fused_model_drafts_for_another(gate, specialists):
    # its own cache goes back over several steps of one token each
    other, ids = specialist(layers=3), prompt(batch=1)
    other.generation_config.eos_token_id = None
    expected = other.generate(ids, max_new_tokens=24, do_sample=False)
    drafter = fuse({"text": copy.deepcopy(other), "code": specialist(layers=1)}, gate=gate)
    assert torch.equal(other.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=drafter), expected)


@every_reader
def test_a_conversation_goes_on_from_its_cache(gate, specialists):
    fused = fuse(specialists, gate=gate)
    first = generate(fused, prompt(batch=1), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(batch=1, length=5)], dim=-1)
    kept = copy.deepcopy(first.past_key_values)
    expected = generate(fused, longer, use_cache=False)
    assert torch.equal(generate(fused, longer, past_key_values=first.past_key_values), expected)
    assert torch.equal(generate(fused, longer, past_key_values=kept, custom_generate=self_draft), expected)


@every_reader
@torch.no_grad()
def test_a_cache_that_was_cropped_goes_on_as_one_that_read_less(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt(length=20)
    cache = fused(ids, use_cache=True).past_key_values
    cache.crop(-8)
    # several steps of one token, and one of many
    for token in ids[:, 12:16].split(1, dim=1):
        fused(token, past_key_values=cache, logits_to_keep=1)
    cache.crop(-3)
    found = fused(ids[:, 13:], past_key_values=cache).gate_weights
    torch.testing.assert_close(found, fused(ids).gate_weights[:, 13:], **CLOSE)


@torch.no_grad()
def test_a_cache_that_was_cropped_to_nothing_begins_anew(specialists):
    fused, ids = fuse(specialists, gate="posterior"), prompt(length=20)
    cache = fused(ids, use_cache=True).past_key_values
    fused(ids[:, :2], past_key_values=cache)
    cache.crop(-22)
    torch.testing.assert_close(fused(ids, past_key_values=cache).gate_weights, fused(ids).gate_weights, **CLOSE)


@torch.no_grad()
def test_a_cache_keeps_the_last_tokens_alone_and_says_so_when_it_cannot_go_back(specialists):
    fused, ids = fuse(specialists, gate="posterior"), prompt(length=KEPT + 20)
    cache = fused(ids, use_cache=True).past_key_values
    for token in prompt(length=3).split(1, dim=1):
        fused(token, past_key_values=cache)
    (layer,) = (layer for layer in cache.layers if isinstance(layer, EvidenceLayer))
    assert [t.shape[:2] for t in layer.past] == [(2, KEPT)] * 3
    with pytest.raises(ValueError, match=f"goes back {KEPT - 1} tokens here, but the cache is to be cropped by -70"):
        cache.crop(-70)


# ---------------------------------------------------------------------------------------------- texts side by side


@every_reader
@torch.no_grad()
def test_texts_that_lie_end_to_end_know_nothing_of_each_other(gate, specialists):
    fused, one, two = fuse(specialists, gate=gate), prompt(batch=1, length=9), prompt(batch=1, length=6)
    row = torch.cat([one, two], dim=1)
    expected = torch.cat([fused(one).gate_weights, fused(two).gate_weights], 1)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    # with a cache, the library's attention would see across
    found = fused(row, position_ids=positions, use_cache=False).gate_weights
    torch.testing.assert_close(found, expected, **CLOSE)
    whole = fused(row).gate_weights
    assert torch.equal(whole[:, :9].argmax(-1), expected[:, :9].argmax(-1))
    assert not torch.allclose(whole[:, 9:], expected[:, 9:], atol=1e-3)


def views():
    """One prompt in three specialists' words, of different length, that all end alike. (batch, specialists, seq)"""
    ids = prompt(batch=6, length=12).view(2, 3, 12)
    masks = torch.ones_like(ids)
    ids[:, :, 8:] = ids[:, :1, 8:]
    for row, lengths in enumerate([(0, 2, 5), (4, 0, 1)]):
        for k, padding in enumerate(lengths):
            ids[row, k, :padding] = masks[row, k, :padding] = 0
    return ids, masks


@every_reader
@torch.no_grad()
def test_of_a_prompt_in_everyones_own_words_the_tokens_count_that_all_read(gate, specialists):
    fused, (ids, masks) = fuse(specialists, gate=gate), views()
    own = {"specialist_input_ids": ids, "specialist_attention_mask": masks}
    found = fused(ids[:, 0], attention_mask=masks[:, 0], **own).gate_weights
    for row in range(2):
        states, likelihoods = [], []
        for k, model in enumerate(specialists.values()):
            text = ids[row, k, masks[row, k] == 1][None]
            states.append(model.base_model(text).last_hidden_state[:, -4:])
            p = model(text).logits.softmax(-1)[:, -5:-1]
            likelihoods.append(p.gather(-1, text[:, -4:, None])[0])
        evidence = textbook(torch.cat(likelihoods, -1).tolist(), *fused.model.fusion_gate.evidence)[1:]
        expected = fused.model.fusion_gate(states, torch.tensor([evidence])).weights
        same = (ids[row] == ids[row, :1]).all(0)[8:]
        assert same.all()
        torch.testing.assert_close(found[row : row + 1, 8:], expected, **NEAR)


@pytest.mark.grid
@every_reader
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
def test_every_specialist_continues_its_own_view(options, gate, specialists):
    fused, (ids, masks) = fuse(specialists, gate=gate), views()
    own = {"specialist_input_ids": ids, "specialist_attention_mask": masks, "attention_mask": masks[:, 0]}
    expected = generate(fused, ids[:, 0], use_cache=False, **own)
    assert torch.equal(generate(fused, ids[:, 0], **own, **options), expected)
