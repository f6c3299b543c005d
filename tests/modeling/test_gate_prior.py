"""A prior on the gate: weights for a whole text, from nothing changed to one specialist alone."""

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.adapted import make
from tests.support.adapted import pair as adapters
from tests.support.fusions import MIXTURES
from tests.support.mixes import fuse, prompt
from tests.support.tiny import GATE_WORDS, specialist
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.dropping import drop_specialists
from ultrafuser.decoding.stacking import stack


LENGTH = {"max_new_tokens": 8, "do_sample": False}
PRIOR = torch.tensor([[1.0, 0.5], [0.2, 3.0]])


@pytest.fixture
def pair():
    return {"text": specialist(layers=1), "code": specialist(layers=2)}


def one_hot(k, batch=2):
    return torch.eye(2)[[k] * batch]


@pytest.mark.parametrize("gate", GATE_WORDS)
@torch.no_grad()
def test_ones_change_no_bit_and_other_numbers_multiply_the_weights(gate, pair):
    model, ids = fuse(pair, gate=gate), prompt()
    plain = model(ids)
    ones = model(ids, gate_prior=torch.ones(2, 2))
    assert torch.equal(ones.logits, plain.logits)
    assert torch.equal(ones.gate_weights, plain.gate_weights)
    product = plain.gate_weights * PRIOR[:, None]
    found = model.gate_weights(ids, gate_prior=PRIOR)
    torch.testing.assert_close(found, product / product.sum(-1, keepdim=True), rtol=1e-6, atol=1e-6)
    # two priors are their product
    twice = found * PRIOR[:, None]
    found = model.gate_weights(ids, gate_prior=PRIOR * PRIOR)
    torch.testing.assert_close(found, twice / twice.sum(-1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", GATE_WORDS)
def test_one_specialist_that_a_prior_leaves_says_what_it_says_alone(gate, fusion, pair):
    model, ids = fuse(pair, gate=gate, fusion=fusion), prompt()
    for k, name in enumerate(pair):
        alone = model.specialist(name).generate(ids, **LENGTH)
        assert torch.equal(model.generate(ids, gate_prior=one_hot(k), **LENGTH), alone)
    both = model.generate(ids, gate_prior=torch.eye(2), **LENGTH)
    assert torch.equal(both[1:], alone[1:])


def test_a_calibrated_gate_scales_logits_and_leaves_their_order(pair):
    model, ids = fuse(pair, gate="cross", gate_calibration=True), prompt()
    alone = model.specialist("code").generate(ids, **LENGTH)
    assert torch.equal(model.generate(ids, gate_prior=one_hot(1), **LENGTH), alone)


@torch.no_grad()
def test_adapters_of_one_base_take_a_prior_too(tmp_path):
    (model, _), ids = adapters(make(tmp_path), gate="mlp"), prompt()
    prior = torch.eye(3)[[1, 1]]
    alone = model.specialist("code")(ids).logits
    torch.testing.assert_close(model(ids, gate_prior=prior).logits, alone, rtol=1e-4, atol=1e-5)


def test_a_prior_comes_before_the_sparsifier(pair):
    model, ids = fuse(pair, gate_sparsifier="top_k:1"), prompt()
    for k in range(2):
        assert torch.equal(model.gate_weights(ids, gate_prior=one_hot(k)), one_hot(k)[:, None].expand(-1, 9, -1))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_every_continuation_of_a_text_has_that_texts_prior(options, pair):
    model, ids = fuse(pair), prompt()
    found = model.generate(ids, gate_prior=torch.eye(2), **LENGTH | options).chunk(2)
    for k, name in enumerate(pair):
        assert torch.equal(found[k], model.specialist(name).generate(ids[k : k + 1], **LENGTH | options))


def test_every_way_of_decoding_follows_a_prior(pair):
    pair = {"text": specialist(layers=2), "code": specialist(layers=2)}
    model, ids = fuse(pair), prompt()
    expected = model.generate(ids, gate_prior=PRIOR, **LENGTH)
    assert not torch.equal(expected, model.generate(ids, **LENGTH)), "a prior without effect"
    settings = {"gate_prior": PRIOR, **LENGTH}
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
    assert torch.equal(model.generate(ids, custom_generate=self_draft, **settings), expected)
    assert torch.equal(model.generate(ids, custom_generate=drop_specialists, keep="none", **settings), expected)
    assert torch.equal(stack(model).generate(ids, **settings), expected)
    drafted = model.generate(ids[:1], assistant_model=model.specialist("code"), gate_prior=PRIOR[:1], **LENGTH)
    assert torch.equal(drafted, expected[:1])


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        (torch.ones(2), r"its shape must be \(2, 2\), but it is \(2,\)"),
        (torch.ones(1, 2), r"but it is \(1, 2\)"),
        ([[1, 1], [1, 1]], "but it is a list"),
        (torch.tensor([[1.0, -1.0], [1.0, 1.0]]), "not negative.*-1.0"),
        (torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), "finite.*nan"),
        (torch.tensor([[1.0, torch.inf], [1.0, 1.0]]), "finite.*inf"),
        (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "positive for one specialist of each text"),
        # in float32 they are 0 and infinite
        (torch.tensor([[1.0, 1.0], [1e-60, 0.0]], dtype=torch.float64), "positive .*float32.*1e-60"),
        (torch.tensor([[1.0, 1.0], [1e300, 1.0]], dtype=torch.float64), "finite.*float32.*1e\\+300"),
    ],
)
def test_what_weighs_no_specialists_is_refused(prior, told, pair):
    model = fuse(pair)
    for options in ({}, {"custom_generate": self_draft}, {"custom_generate": drop_specialists}):
        with pytest.raises(ValueError, match=f"`gate_prior`.*{told}"):
            model.generate(prompt(), gate_prior=prior, **LENGTH, **options)


def test_continuous_batching_has_no_prior(pair):
    model = UltraFuserForCausalLM.from_specialists(pair)
    with pytest.raises(ValueError, match="one batch of all texts.*`gate_prior`.*generate"):
        model.generate_batch([[5, 9]], gate_prior=torch.ones(1, 2))
