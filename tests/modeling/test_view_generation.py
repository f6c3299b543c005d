"""Every specialist continues its own view of the prompt."""

import pytest
import torch

from tests.support.mixes import MIXES, fuse, prompt


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


@pytest.mark.grid
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


@pytest.mark.grid
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
