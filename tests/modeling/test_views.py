"""Every specialist reads the prompt in its own view: logits of one pass."""

import pytest
import torch

from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, prompt


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- views of one prompt


@pytest.mark.parametrize("fusion", MIXTURES)
@torch.no_grad()
def test_views_that_are_all_alike_change_nothing(fusion, specialists):
    fused, ids, mask = fuse(specialists, fusion=fusion), prompt(), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    views, masks = (t[:, None].expand(-1, 3, -1) for t in (ids, mask))
    plain = fused(ids, attention_mask=mask, position_ids=positions).logits
    viewed = fused(ids, attention_mask=mask, specialist_input_ids=views, specialist_attention_mask=masks).logits
    assert_same(viewed[0], plain[0])
    assert_same(viewed[1, 4:], plain[1, 4:])


@torch.no_grad()
def test_views_without_a_mask_are_read_from_their_first_token(fused):
    ids = prompt()
    assert_same(fused(ids, specialist_input_ids=ids[:, None].expand(-1, 3, -1)).logits, fused(ids).logits)


@pytest.mark.parametrize("fusion", MIXTURES)
@torch.no_grad()
def test_each_specialist_reads_its_own_view_and_its_own_padding(fusion, specialists):
    fused = fuse(specialists, fusion=fusion)
    views, masks = own_views()
    outputs = fused(views[:, 0], specialist_input_ids=views, specialist_attention_mask=masks)
    for row in range(2):
        # the last three tokens are the shared response
        hidden, logits = [], []
        for k, model in enumerate(specialists.values()):
            alone = views[row : row + 1, k, masks[row, k] == 1]
            hidden.append(model.base_model(alone).last_hidden_state[:, -3:])
            logits.append(model(alone).logits[:, -3:])
        weights = fused.model.fusion_gate(hidden).weights
        own = [words.softmax(-1) if fusion == "probabilities" else words for words in logits]
        total = sum(weights[..., k : k + 1] * words for k, words in enumerate(own))
        assert_same(outputs.gate_weights[row, -3:], weights[0])
        assert_same(outputs.logits[row, -3:], total[0].log() if fusion == "probabilities" else total[0])


def own_views(response=3):
    """Prompts that differ in words and in length, padded on the left, before one response. (batch, specialists, seq)"""
    views = torch.randint(3, 99, (2, 3, 9 + response))
    views[:, :, 9:] = views[:, :1, 9:]
    masks = torch.ones_like(views)
    for row, lengths in enumerate([(0, 2, 5), (4, 0, 1)]):
        for k, padding in enumerate(lengths):
            views[row, k, :padding] = masks[row, k, :padding] = 0
    return views, masks


@pytest.mark.grid
@pytest.mark.parametrize(
    ("shape", "complaint"),
    [((2, 9), "one row per specialist"), ((2, 2, 9), "one row per specialist"), ((2, 3, 7), "padded on the left")],
)
def test_views_of_another_shape_are_refused(shape, complaint, fused):
    with pytest.raises(ValueError, match=complaint):
        fused(prompt(), specialist_input_ids=torch.ones(shape, dtype=torch.long))


def test_a_mask_of_views_with_another_number_of_specialists_is_refused(fused):
    with pytest.raises(ValueError, match="specialist_attention_mask"):
        fused(prompt(), specialist_attention_mask=torch.ones(2, 4, 9, dtype=torch.long))


def test_embeddings_in_place_of_tokens_are_refused(fused):
    with pytest.raises(ValueError, match="reads token ids"):
        fused(inputs_embeds=torch.zeros(1, 4, 32))


def test_no_tokens_at_all_are_refused(fused):
    with pytest.raises(ValueError, match="`input_ids` is None"):
        fused()
