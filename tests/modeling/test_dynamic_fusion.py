"""Dynamic fusion with several tuned models, against the sum that it makes small and every combination of factors."""

import itertools

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.fusion_dynamic_ultrafuser import factors, moved
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from tests.support.mixes import prompt
from tests.support.tiny import specialist
from ultrafuser.build.specialist_edits import add_specialist, remove_specialist


GRID = [i / 10 for i in range(21)]
TOKENS = 200
NAMES = ["large", "text", "base", "code"]
RULE = "dynamic:large,base"


def divergence(first, second):
    return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)


def predictions(tuned: int, how_far: float, vocab: int = 12):
    """Log-probabilities of a large model, a base and tuned ones at some tokens. Shapes (tokens, vocab)."""
    rng = torch.Generator().manual_seed(0)
    large, shift, *steps = torch.randn(2 + tuned, TOKENS, vocab, generator=rng)
    base = (2 * large + shift).log_softmax(-1)
    return (2 * large).log_softmax(-1), base, [(base + how_far * step).log_softmax(-1) for step in steps]


def found_by_rule(large, base, tuned):
    away = torch.stack([divergence(own, base) for own in tuned])
    back = torch.stack([divergence(base, own) for own in tuned])
    return factors(large, [own - base for own in tuned], away, back)


def missed(large, base, tuned, x):
    """The sum of squares at factors x, by divergences as they are defined. Shape (tokens,)."""
    predicted = (large + sum(f[..., None] * (own - base) for f, own in zip(x, tuned, strict=True))).log_softmax(-1)
    away = [divergence(predicted, large) - divergence(own, base) for own in tuned]
    back = [divergence(large, predicted) - divergence(base, own) for own in tuned]
    return sum(a**2 + b**2 for a, b in zip(away, back, strict=True))


def everywhere(large, base, tuned):
    """The least sum of all combinations of factors. Shape (tokens,)."""
    tried = (torch.tensor(x)[:, None] for x in itertools.product(GRID, repeat=len(tuned)))
    return torch.stack([missed(large, base, tuned, x) for x in tried]).amin(0)


@pytest.mark.parametrize("how_far", [0.5, 2.0])
def test_of_one_tuned_model_the_least_of_all_is_found(how_far):
    models = predictions(1, how_far)
    found = missed(*models, found_by_rule(*models))
    torch.testing.assert_close(found, everywhere(*models), rtol=1e-3, atol=1e-6)


# how far tuning went, and how much of the least of all combinations the mean may be above it; found are 35% in both
@pytest.mark.parametrize(("how_far", "most_above"), [(0.5, 0.03), (2.0, 0.05)])
def test_of_two_no_single_change_is_better_and_all_combinations_are_hardly_so(how_far, most_above):
    models = predictions(2, how_far)
    x = found_by_rule(*models)
    found = missed(*models, x)
    for k, value in itertools.product(range(2), GRID):
        other = x.clone()
        other[k] = value
        assert (found <= missed(*models, other) + 1e-5).all()
    least = everywhere(*models)
    assert (found >= least - 1e-5).all()
    assert found.mean() <= (1 + most_above) * least.mean()
    assert (found <= least + 1e-5).float().mean() > 0.3


def test_a_model_that_is_there_twice_counts_once():
    large, base, (own,) = predictions(1, 1.0)
    once, twice = found_by_rule(large, base, [own]), found_by_rule(large, base, [own, own])
    inside = once[0] < 2
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(twice.sum(0)[inside], once[0][inside], rtol=0, atol=1e-5)


def test_one_that_tuning_left_as_it_was_pulls_the_others_back():
    # the target is the mean of the changes, and its own change is none
    large, base, (own,) = predictions(1, 1.0)
    with_base = found_by_rule(large, base, [own, base])[0]
    alone = found_by_rule(large, base, [own])[0]
    assert (with_base <= alone).all()
    assert with_base.mean() < 0.8 * alone.mean()


def test_the_order_of_specialists_does_not_matter():
    large, base, tuned = predictions(3, 1.0)
    forward, backward = found_by_rule(large, base, tuned), found_by_rule(large, base, tuned[::-1])
    assert torch.equal(forward, backward.flip(0))
    # so that none is before the others
    assert forward.mean(-1).min() > 0.2


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: specialist("llama", hidden_size=64 if name == "large" else 32, layers=1) for name in NAMES}


def fuse(models, **options):
    return UltraFuserForCausalLM.from_specialists(models, **{"gate": "uniform", "fusion": RULE, **options}).eval()


@torch.no_grad()
def test_a_fused_model_predicts_by_the_factors_and_so_does_a_loaded_one(models, tmp_path):
    model, ids = fuse(models), prompt()
    large, text, base, code = (models[name](ids).logits.log_softmax(-1) for name in NAMES)
    shifts = [text - base, code - base]
    expected = moved(large, shifts, found_by_rule(large, base, [text, code])).log_softmax(-1)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(UltraFuserForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.generate(ids, max_new_tokens=3, do_sample=False)


def test_tuned_models_come_and_go_and_one_stays(models, tmp_path):
    model = fuse(models)
    specialist("llama", hidden_size=32, layers=1).save_pretrained(tmp_path)
    assert add_specialist(model, "math", tmp_path).config.specialist_names == [*NAMES, "math"]
    one = remove_specialist(model, "code")
    with pytest.raises(Refusal, match="Dynamic fusion is of a large model, small ones that were tuned"):
        remove_specialist(one, "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "dynamic:large,small"}, "Fuse these, three or more, and name the large model and the base"),
        ({"fusion": "dynamic:large,base,code"}, "dynamic takes the name of the large model and that of the small one"),
        ({"gate": "mlp"}, "`gate` is 'mlp'.*would have no effect"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(models, options, message):
    with pytest.raises(ValueError, match=message):
        fuse(models, **options)
