"""Weight merges, against what one can work out by hand."""

import pytest
import torch

from tests.support.tiny import specialist
from ultrafuser.merge import MERGES, merge_method
from ultrafuser.merge.merged_model import NotMergeableError, lines_start, merge


# without layers' inputs, of any number of specialists
ANY = sorted(method for method, kind in MERGES.items() if kind.scales)


@pytest.fixture
def base():
    return specialist("llama")


@pytest.fixture
def models():
    return {name: specialist("llama") for name in ("text", "code", "math")}


def states(models):
    return [m.state_dict() for m in models.values()]


def test_the_average_is_the_average_with_a_base_or_without(base, models):
    for given in (None, base):
        merged = merge(models, "average", base=given).state_dict()
        for key, tensor in merged.items():
            expected = torch.stack([s[key] for s in states(models)]).mean(0)
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_task_arithmetic_adds_the_changes_to_the_base(base, models):
    merged = merge(models, "task_arithmetic", base=base, weight=0.5).state_dict()
    for key, origin in base.state_dict().items():
        expected = origin + 0.5 * sum(s[key] - origin for s in states(models))
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)


def test_ties_keeps_what_is_large_and_agrees(base, models):
    key = "model.layers.0.mlp.up_proj.weight"
    merged = merge(models, "ties", base=base).state_dict()[key]
    origin = base.state_dict()[key]
    changes = []
    for state in states(models):
        change = state[key] - origin
        threshold = change.abs().flatten().sort().values[change.numel() // 2]
        changes.append(change * (change.abs() >= threshold))
    for place in [(0, 0), (3, 5), (17, 20), (40, 31)]:
        values = [c[place].item() for c in changes]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [v for v in values if v * sign > 0]
        expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert (merged[place] - origin[place]).item() == pytest.approx(expected, abs=1e-5)


def test_dare_drops_half_of_the_numbers_and_doubles_the_rest(base, models):
    one = {"text": models["text"]}
    key = "model.layers.0.mlp.up_proj.weight"
    change = models["text"].state_dict()[key] - base.state_dict()[key]
    merged = merge(one, "dare", base=base, seed=3).state_dict()[key] - base.state_dict()[key]
    kept = merged.abs() > 1e-7
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(merged[kept], 2 * change[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(
        merge(one, "dare", base=base, seed=3).state_dict()[key],
        merge(one, "dare", base=base, seed=3).state_dict()[key],
    )


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_a_density_is_a_setting(base, models):
    key = "model.layers.0.mlp.up_proj.weight"
    one = {"text": models["text"]}
    change = models["text"].state_dict()[key] - base.state_dict()[key]
    for method in ("ties:0.2", "dare:0.2"):
        kept = merge(one, method, base=base).state_dict()[key] - base.state_dict()[key]
        assert (kept.abs() > 1e-7).float().mean().item() == pytest.approx(0.2, abs=0.03)
    for whole in ("ties:1", "dare:1.0"):
        torch.testing.assert_close(merge(one, whole, base=base).state_dict()[key] - base.state_dict()[key], change)


@pytest.mark.parametrize("word", ["ties:0", "dare:1.5", "ties:", "ties:half"])
def test_what_is_no_density_is_rejected(word):
    with pytest.raises(ValueError, match="share of each change that a merge keeps, above 0 and up to 1"):
        merge_method(word)


def test_lines_raises_the_factor_linearly_over_the_layers_alone():
    deep = {name: specialist("llama", layers=4) for name in ("base", "text", "code", "math")}
    base = deep.pop("base")
    merged = merge(deep, "task_arithmetic", base=base, weight=1 / 3, slope=0.5).state_dict()
    factors = {f"model.layers.{layer}.mlp.up_proj.weight": 1 / 3 + 0.5 * layer / 3 for layer in range(4)}
    factors |= dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), 1 / 3)
    for key, factor in factors.items():
        origin = base.state_dict()[key]
        expected = origin + factor * sum(s[key] - origin for s in states(deep))
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)


def test_lines_starts_at_what_the_merge_takes_from_the_sum_of_changes(base, models):
    assert lines_start(models, "task_arithmetic", base=base) == pytest.approx(1 / 3)
    assert lines_start(models, "average", base=base) == pytest.approx(1, rel=1e-4)
    merged, sums = merge(models, "ties", base=base).state_dict(), 0.0
    for key, origin in base.state_dict().items():
        sums += sum(s[key] - origin for s in states(models)).abs().sum().item()
    size = sum((t - base.state_dict()[key]).abs().sum().item() for key, t in merged.items())
    assert lines_start(models, "ties", base=base) == pytest.approx(sums / size / 3, rel=1e-4)


@pytest.mark.parametrize("method", ANY)
def test_specialists_equal_to_their_base_merge_to_it(method, base):
    merged = merge({"one": base, "two": base}, method, base=base).state_dict()
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(merged[key], tensor)


@pytest.mark.parametrize("method", ANY)
def test_a_merge_is_made_where_the_specialists_are(method, base, models):
    away = {name: model.to("meta") for name, model in models.items()}
    merged = merge(away, method, base=base.to("meta"), slope=0.5)
    assert {p.device.type for p in merged.parameters()} == {"meta"}


def test_small_changes_of_16_bit_weights_are_added_up_before_they_are_rounded(base):
    base, one, two = (specialist("llama").bfloat16() for _ in range(3))
    for model, value in ((base, 1.0), (one, 1.0078125), (two, 1.0078125)):
        model.model.norm.weight.data.fill_(value)
    merged = merge({"one": one, "two": two}, "task_arithmetic", base=base, weight=0.5)
    # the step of 16-bit numbers above 1 is 2**-7: half of it is lost twice where each half is rounded
    assert merged.model.norm.weight[0].item() == 1.0078125


def test_the_specialists_stay_as_they_were(base, models):
    before = [{k: t.clone() for k, t in s.items()} for s in states(models)]
    merge(models, "ties", base=base, slope=0.5)
    for old, new in zip(before, states(models), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


def test_what_cannot_be_merged_is_refused_with_the_reason(base, models):
    with pytest.raises(NotMergeableError, match="no base was given"):
        merge(models, "ties")
    with pytest.raises(NotMergeableError, match="must have one shape"):
        merge({**models, "deep": specialist("llama", layers=3)}, "average")
    other = specialist("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with pytest.raises(NotMergeableError, match="trained for other positions"):
        merge({**models, "far": other}, "average")
    with pytest.raises(ValueError, match="Unknown merge 'mean'"):
        merge(models, "mean")
