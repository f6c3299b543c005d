"""Those that are kept draft for each other: the same tokens, caches and weights, in fewer passes."""

import copy

import pytest
import torch

from tests.support.mixes import MIXES, fuse, prompt
from tests.ultrafuser.decoding.test_drafting import Heard, passes
from tests.ultrafuser.decoding.test_dropping import ALL_GATES, drop, generate, one_by_one
from ultrafuser.decoding.dropping import Asked


def assert_same_caches(cache, other):
    """Of equal texts, and windows no shorter than attention will read them."""
    for own, expected in zip(cache.layers, other.layers, strict=True):
        if getattr(expected, "keys", None) is None:
            past = [(layer.past.states, layer.past.evidence) for layer in (own, expected)]
            last = min(states.shape[1] for states, _ in past)
            for one, two in zip(*past, strict=True):
                torch.testing.assert_close(one[:, -last:], two[:, -last:], atol=1e-4, rtol=1e-4)
            continue
        read = expected.get_seq_length()
        assert own.get_seq_length() == read
        lengths = [min(read, layer.sliding_window - 1) if layer.is_sliding else read for layer in (own, expected)]
        for name in ("keys", "values"):
            one, two = getattr(own, name), getattr(expected, name)
            assert min(one.shape[2], two.shape[2]) >= lengths[0]
            one, two = (t[:, :, -lengths[0] :] for t in (one, two))
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("options", ALL_GATES.values(), ids=ALL_GATES)
@pytest.mark.parametrize("mix", ["one family", "windows"])
@pytest.mark.parametrize("keep", ["top_p:1.0", "top_k:2"])
def test_drafts_change_no_token_and_no_cache(keep, mix, options):
    fused, ids = fuse(MIXES[mix](), **options), prompt(batch=2, length=12)
    found = [
        way(fused, ids, keep, 8, max_new_tokens=20, eos_token_id=None, return_dict_in_generate=True)
        for way in (drop, one_by_one)
    ]
    assert torch.equal(*(f.sequences for f in found))
    assert_same_caches(*(f.past_key_values for f in found))


@pytest.mark.parametrize(("keep", "checking"), [("top_k:1", 0), ("top_k:2", 1), ("top_p:1.0", 2)])
def test_a_leader_who_is_right_drafts_for_those_that_are_kept(keep, checking):
    fused, ids = fuse(MIXES["one family"](), gate="constant"), prompt(batch=1)
    fused.model.fusion_gate.logits.data = torch.tensor([40.0, 20.0, 0.0])
    counts = passes(fused, lambda: drop(fused, ids, keep, 10, max_new_tokens=12, eos_token_id=None))
    # all at three decisions; in between, four drafts and then the five tokens that are left are checked at once
    assert counts.pop("text") == 12
    assert sorted(counts.values()) == [3] * (2 - checking) + [3 + 2] * checking


def alike(mix="one family", gate="constant"):
    """Specialists that are nearly one, so that drafts are taken."""
    parts = MIXES[mix]()
    first = next(iter(parts))
    torch.manual_seed(5)
    for name in parts:
        own = copy.deepcopy(parts[first])
        with torch.no_grad():
            for weight in own.parameters():
                weight.add_(0.02 * weight.std() * torch.randn_like(weight))
        parts[name] = own
    return fuse(parts, gate=gate)


@pytest.mark.parametrize("keep", ["top_p:1.0", "top_k:2"])
@pytest.mark.parametrize("mix", ["one family", "windows"])
@pytest.mark.parametrize("gate", ["constant", "evidence"])
def test_texts_end_within_drafts_where_they_would_without(gate, mix, keep, monkeypatch):
    fused, ids, ended = alike(mix, gate), prompt(batch=2, length=12), 0
    taken, take = [], Asked.take
    monkeypatch.setattr(Asked, "take", lambda asked, count: [taken.append(count), take(asked, count)])
    whole = drop(fused, ids, keep, 10**9, max_new_tokens=16, eos_token_id=None)
    assert max(taken) > 2
    for end in whole[0, ids.shape[1] + 3 : ids.shape[1] + 7].unique().tolist():
        for texts in (ids[:1], ids):
            heard, options = Heard(), {"max_new_tokens": 16, "eos_token_id": end, "pad_token_id": 0}
            options |= {"return_dict_in_generate": True, "streamer": heard if len(texts) == 1 else None}
            drafted = drop(fused, texts, keep, 10**9, **options)
            plain = one_by_one(fused, texts, keep, 10**9, **{**options, "streamer": None})
            assert torch.equal(drafted.sequences, plain.sequences)
            assert_same_caches(drafted.past_key_values, plain.past_key_values)
            if len(texts) == 1:
                assert (heard.tokens, heard.ends) == (drafted.sequences[0].tolist(), 1)
            ended += drafted.sequences.shape[1] < whole.shape[1]
    assert ended


@pytest.mark.parametrize("keep", ["top_p:1.0", "top_k:2"])
@pytest.mark.parametrize("length", range(14, 24, 3))
def test_a_conversation_goes_on_after_drafts(length, keep):
    fused, ids = alike("windows"), prompt(batch=1, length=12)
    stop = [lambda ids, _: torch.full((len(ids),), ids.shape[1] >= length)]
    settings = {"max_new_tokens": 30, "eos_token_id": None, "return_dict_in_generate": True}
    first = drop(fused, ids, keep, 9, stopping_criteria=stop, **settings)
    assert first.sequences.shape[1] == length
    longer = torch.cat([first.sequences, prompt(batch=1, length=3)], dim=-1)
    whole = {"attention_mask": torch.ones_like(longer)}
    expected = generate(fused, longer, use_cache=False, **whole)
    assert torch.equal(generate(fused, longer, past_key_values=first.past_key_values, **whole), expected)


def test_a_streamer_is_told_the_weights_of_each_token():
    class Weighed(Heard):
        def __init__(self):
            super().__init__()
            self.weights = []

        def weigh(self, weights):
            self.weights.append(weights[0].tolist())

    fused, ids, found = alike(gate="mlp"), prompt(batch=1), []
    for way in (drop, one_by_one):
        found.append(Weighed())
        way(fused, ids, "top_k:2", 8, max_new_tokens=16, eos_token_id=None, streamer=found[-1])
    drafted, plain = (torch.tensor(streamer.weights) for streamer in found)
    assert drafted.shape == (16, 3)
    torch.testing.assert_close(drafted, plain, atol=1e-5, rtol=1e-5)
