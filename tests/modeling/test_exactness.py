"""A fused model says exactly what its specialists say, weighed by its gate."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.fusions import MIXTURES
from tests.support.mixes import MIXES, fuse, naive_gate_weights, naive_logits, prefer, prompt
from tests.support.tiny import GATE_WORDS


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- the naive sum


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_fused_model_says_the_weighed_sum_of_what_its_specialists_say(mix, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    outputs = fused(ids)
    assert_same(outputs.gate_weights, naive_gate_weights(fused, specialists, ids))
    assert_same(outputs.logits, naive_logits(fused, specialists, ids, outputs.gate_weights))


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", GATE_WORDS)
@torch.no_grad()
def test_the_sum_holds_for_every_gate(gate, fusion, specialists):
    fused, ids = fuse(specialists, gate=gate, fusion=fusion), prompt()
    outputs = fused(ids)
    assert_same(outputs.gate_weights, naive_gate_weights(fused, specialists, ids))
    assert_same(outputs.logits, naive_logits(fused, specialists, ids, outputs.gate_weights))


@torch.no_grad()
def test_the_gates_of_these_tests_change_their_mind_from_token_to_token(fused):
    weights = fused(prompt()).gate_weights
    assert weights.shape == (2, 9, 3)
    assert len(weights.argmax(-1).unique()) > 1
    assert weights.std(dim=1).min() > 0.05


@torch.no_grad()
def test_a_soft_cap_is_applied_once_and_after_mixing():
    specialists = MIXES["soft caps"]()
    fused, ids = fuse(specialists, gate="uniform"), prompt()
    capped_first = sum(m(ids).logits for m in specialists.values()) / 2
    logits = fused(ids).logits
    assert logits.abs().max() < 1.5
    # the two differ by far more than rounding, so that the sum above cannot hold by accident
    assert (logits - capped_first).abs().max() > 0.1


@torch.no_grad()
def test_mixed_probabilities_are_probabilities(specialists):
    logits = fuse(specialists, fusion="probabilities")(prompt()).logits
    assert_same(logits.exp().sum(-1), torch.ones(2, 9))


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("mix", ["one family", "soft caps", "scale factors"])
@torch.no_grad()
def test_a_gate_that_listens_to_one_specialist_makes_the_fused_model_that_specialist(mix, fusion):
    specialists = MIXES[mix]()
    fused, ids = fuse(specialists, gate="constant", fusion=fusion), prompt()
    for name, model in specialists.items():
        prefer(fused, name)
        own = model(ids).logits
        assert_same(fused(ids).logits, own.log_softmax(-1) if fusion == "probabilities" else own)


@torch.no_grad()
def test_gate_weights_are_those_of_the_forward_pass(fused):
    ids, mask = prompt(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    torch.testing.assert_close(
        fused.gate_weights(ids, attention_mask=mask), fused(ids, attention_mask=mask).gate_weights, rtol=0, atol=0
    )


# ---------------------------------------------------------------------------------------------- cache and padding


def in_chunks(fused, ids, cache, sizes):
    logits = [fused(chunk, past_key_values=cache, use_cache=True).logits for chunk in ids.split(sizes, dim=-1)]
    return torch.cat(logits, dim=1)


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_token_by_token_with_a_cache_equals_all_at_once_without(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=14)
    cache = DynamicCache(config=fused.config)
    assert_same(in_chunks(fused, ids, cache, [6] + [1] * 8), fused(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 14


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_long_prompt_may_come_in_chunks(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=14)
    assert_same(
        in_chunks(fused, ids, DynamicCache(config=fused.config), [5, 1, 7, 1]), fused(ids, use_cache=False).logits
    )


@torch.no_grad()
def test_a_cache_made_without_a_configuration_serves_as_well(fused):
    ids = prompt(length=12)
    assert_same(in_chunks(fused, ids, DynamicCache(), [5, 4, 1, 1, 1]), fused(ids, use_cache=False).logits)


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_static_cache_says_what_a_dynamic_one_says(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=12)
    static = StaticCache(config=fused.config, max_cache_len=16)
    assert_same(in_chunks(fused, ids, static, [8, 1, 1, 1, 1]), fused(ids, use_cache=False).logits)


@torch.no_grad()
def test_the_cache_that_comes_back_goes_on(fused):
    ids = prompt()
    first = fused(ids[:, :5])
    second = fused(ids[:, 5:], past_key_values=first.past_key_values)
    assert_same(torch.cat([first.logits, second.logits], dim=1), fused(ids, use_cache=False).logits)
    assert fused(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_in_training_no_cache_is_kept_unless_asked_for(fused):
    assert fused.train()(prompt()).past_key_values is None


@pytest.mark.grid
@pytest.mark.parametrize("mix", MIXES)
@torch.no_grad()
def test_a_row_padded_on_the_left_says_what_it_says_alone(mix):
    fused, ids = fuse(MIXES[mix]()), prompt(length=12)
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = fused(ids, attention_mask=mask, position_ids=positions).logits
    assert_same(batch[0], fused(ids[:1]).logits[0])
    assert_same(batch[1, 5:], fused(ids[1:, 5:]).logits[0])


# ---------------------------------------------------------------------------------------------- logits and loss


@pytest.mark.parametrize("fusion", MIXTURES)
@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    logits = fused(ids).logits
    assert_same(fused(ids, logits_to_keep=2).logits, logits[:, -2:])
    kept = torch.tensor([0, 3, 8])
    assert_same(fused(ids, logits_to_keep=kept).logits, logits[:, kept])


@pytest.mark.parametrize("fusion", MIXTURES)
@torch.no_grad()
def test_the_loss_is_plain_cross_entropy_over_labelled_tokens(fusion, specialists):
    fused, ids = fuse(specialists, fusion=fusion), prompt()
    labels = ids.clone()
    labels[:, :3] = -100
    outputs = fused(ids, labels=labels)
    by_hand = [
        -outputs.logits[row, t - 1].log_softmax(-1)[ids[row, t]].item() for row in range(2) for t in range(3, 9)
    ]
    assert outputs.loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@torch.no_grad()
def test_the_loss_divides_by_the_number_of_tokens_it_is_told(fused):
    ids = prompt()
    mean, told = fused(ids, labels=ids).loss, fused(ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss
    assert_same(told * 40, mean * 16)


# ---------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("fusion", MIXTURES)
@torch.no_grad()
def test_half_precision_says_nearly_the_same_and_weighs_in_float32(fusion, specialists):
    ids = prompt()
    exact = fuse(specialists, fusion=fusion)
    half = fuse(specialists, fusion=fusion, dtype=torch.bfloat16)
    half.model.fusion_gate.load_state_dict(exact.model.fusion_gate.state_dict())
    outputs = half(ids)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.gate_weights.dtype == torch.float32
    assert {p.dtype for p in half.model.fusion_gate.parameters()} == {torch.float32}
    assert_same(outputs.gate_weights.sum(-1), torch.ones(2, 9))
    assert (outputs.logits - exact(ids).logits).abs().mean() < 0.05


@pytest.mark.grid
@pytest.mark.parametrize("gate", GATE_WORDS)
@torch.no_grad()
def test_a_model_cast_as_a_whole_still_weighs_in_float32(gate, specialists):
    fused, ids = fuse(specialists, gate=gate), prompt()
    exact = fused(ids).logits
    outputs = fused.to(torch.bfloat16)(ids)
    assert outputs.gate_weights.dtype == torch.float32
    assert_same(outputs.gate_weights.sum(-1), torch.ones(2, 9))
    assert (outputs.logits - exact).abs().mean() < 0.1


@torch.no_grad()
def test_a_model_that_was_cast_in_memory_can_be_fused(specialists):
    ids = prompt()
    exact = fuse(specialists, gate="uniform")(ids).logits
    # rounds the rotary frequencies too, which loading in bfloat16 does not
    cast = {name: model.to(torch.bfloat16) for name, model in specialists.items()}
    assert (fuse(cast, gate="uniform")(ids).logits - exact).abs().mean() < 0.05


@torch.no_grad()
def test_under_autocast_the_gate_still_weighs_in_float32(fused):
    ids = prompt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = fused(ids)
    assert outputs.gate_weights.dtype == torch.float32
    assert_same(outputs.gate_weights.sum(-1), torch.ones(2, 9))
