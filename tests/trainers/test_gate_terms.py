"""Terms on gate weights, by hand: balance within groups, and the specialist that predicts a token best."""

import math
from types import SimpleNamespace

import pytest
import torch

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.stages import build, domains, logs, trainer
from trainers import GateTrainer
from trainers.forward_hooks import best_specialists, capture
from trainers.gate_cache import CachedGateTrainer
from trainers.losses import gate_terms, group_factors


NAMES = ["text", "code", "math"]
GROUPS = {"world": ["text"], "task": ["code", "math"]}


def settings(**own):
    off = {"gate_entropy": 0.0, "gate_balance": 0.0, "gate_domain": 0.0, "gate_domain_steps": 100, "gate_scale": 0.0}
    return SimpleNamespace(**{**off, "gate_groups": None, "gate_groups_strength": 0.1, **own})


def weights(*shape):
    return torch.rand(*shape, 3, dtype=torch.float64).softmax(-1).requires_grad_()


def gradient(value, of):
    return torch.autograd.grad(value, of)[0]


# -------------------------------------------------------------------------------------------------------- groups


def test_a_specialist_counts_more_in_domains_of_its_group_and_mixed_examples_count_as_they_are():
    found = group_factors(settings(gate_groups=GROUPS), [*NAMES, "mixed"], NAMES)
    assert found.tolist() == [[1.1, 0.9, 0.9], [0.9, 1.1, 1.1], [0.9, 1.1, 1.1], [1, 1, 1]]
    assert group_factors(settings(), NAMES, NAMES) is None


def test_at_the_last_steps_mean_the_gradient_is_that_of_the_coefficient_of_variation():
    own, domain = weights(4, 5), torch.randint(3, (4, 5))
    args = settings(gate_balance=2.0, gate_groups=GROUPS, gate_groups_strength=0.3)
    factors = group_factors(args, NAMES, NAMES)
    mean = (own * factors[domain]).flatten(0, 1).mean(0)
    # the square of sd / mean of what each specialist has in all, plus 1
    variation = mean.var(correction=0) / mean.mean() ** 2 + 1
    term = gate_terms(args, own, domain, [0, 1, 2], mean.detach(), 0, factors=factors).mean()
    torch.testing.assert_close(term, 2 * variation)
    torch.testing.assert_close(gradient(term, own), gradient(2 * variation, own))


def test_without_strength_it_is_the_plain_balance():
    own, domain, mean = weights(2, 3), torch.randint(3, (2, 3)), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    args = settings(gate_balance=0.7, gate_groups=GROUPS, gate_groups_strength=0.0)
    grouped = gate_terms(args, own, domain, [0, 1, 2], mean, 0, factors=group_factors(args, NAMES, NAMES))
    plain = gate_terms(args, own, domain, [0, 1, 2], mean, 0)
    torch.testing.assert_close(grouped, plain)


def test_a_stage_takes_the_mean_with_the_factors(fused, tmp_path):
    run = trainer(GateTrainer, fused, tmp_path, gate_balance=1.0, gate_groups=GROUPS, max_steps=1, learning_rate=0.0)
    run.train()
    seen = run.statistics.since("a test", run.accelerator)
    sums, tokens = torch.tensor(seen.gate), seen.tokens.sum()
    expected = (sums * torch.tensor([[0.9, 1.1, 1.1], [0.9, 1.1, 1.1], [1.1, 0.9, 0.9]])).sum(0) / tokens
    assert run.domains == ["code", "math", "text"]
    by_name = torch.tensor([[0.9, 1.1, 1.1], [0.9, 1.1, 1.1], [1.1, 0.9, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(run.gate_factors, by_name)
    torch.testing.assert_close(run.statistics.last_mean, expected)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"gate_groups": GROUPS}, "`gate_groups` say how `gate_balance` balances, but that is 0"),
        (
            {"gate_balance": 1.0, "gate_groups": {"a": ["text", "code"]}},
            r"each domain in one group.*\['code', 'text'\]",
        ),
        ({"gate_balance": 1.0, "gate_groups": {"a": NAMES, "b": ["text"]}}, "in one group.*'text', 'text'"),
        ({"gate_balance": 1.0, "gate_groups": {"a": "text"}}, "a list of names by group, but is"),
        ({"gate_balance": 1.0, "gate_groups": {**GROUPS, "c": ["law"]}}, "in one group.*'law'"),
        ({"gate_groups_strength": 1.0}, "at least 0 and below 1, but is 1.0"),
        ({"gate_domain_target": "worst"}, "is 'domain' or 'best', but is 'worst'"),
    ],
)
def test_groups_and_targets_that_cannot_be_are_refused(own, told, fused, tmp_path):
    with pytest.raises(ValueError, match=told):
        trainer(GateTrainer, fused, tmp_path, **own)


# ---------------------------------------------------------------------------------------------------------- best


@torch.no_grad()
def test_the_best_specialist_is_the_one_with_the_largest_probability_of_the_token(fused):
    ids = torch.randint(3, 99, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    with capture(fused, own=True) as seen:
        fused.model(ids)
    seen["scores"] = SimpleNamespace(label_mask=labels[:, 1:] != -100)
    found = best_specialists(SimpleNamespace(fused=fused), seen, labels)
    alone = torch.stack([fused.specialist(n)(ids).logits.log_softmax(-1)[:, :-1] for n in NAMES])
    expected = alone.gather(-1, ids[None, :, 1:, None].expand(3, -1, -1, -1))[..., 0].argmax(0)
    assert torch.equal(found, expected.where(seen["scores"].label_mask, 0))


def test_where_one_specialist_is_always_best_it_is_the_warm_start_of_its_domain():
    own, domain = weights(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    args = settings(gate_domain=1.5)
    of_domain = gate_terms(args, own, domain, [2, 1, 0], torch.zeros(3), 20)
    best = gate_terms(args, own, domain + 3, [2, 1, 0], torch.zeros(3), 20, best=torch.full((2, 3), 2))
    assert torch.equal(of_domain, best)


def test_tokens_of_a_domain_without_a_specialist_are_left_to_the_loss():
    own, domain = weights(1, 4), torch.tensor([[0, 1, 2, 1]])
    terms = gate_terms(settings(gate_domain=1.5), own, domain, [2, None], torch.zeros(3), 0)
    assert terms[0, 1:].tolist() == [0, 0, 0]
    assert terms[0, 0].item() == pytest.approx(-1.5 * own[0, 0, 2].log().item())


def test_a_domain_without_a_specialist_is_told_and_the_others_lead_the_gate(fused, tmp_path):
    data = domains({NAMES[0]: 4, "both": 4})
    once = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 4}
    with pytest.warns(UserWarning, match="No specialist is called both: `gate_domain` leaves rows of that domain"):
        led = trainer(GateTrainer, fused, tmp_path / "led", data, gate_domain=1.0, **once)
    plain = trainer(GateTrainer, fused, tmp_path / "plain", data, **once)
    led.train(), plain.train()
    assert logs(led)[0]["loss"] > logs(plain)[0]["loss"]


def test_the_best_need_no_names_of_domains_and_the_start_ends(fused, tmp_path):
    data = domains({"a": 4, "b": 4})

    def losses(**own):
        run = trainer(
            GateTrainer, fused, tmp_path, data, learning_rate=0.0, max_steps=3, per_device_train_batch_size=4, **own
        )
        run.train()
        return [entry["loss"] for entry in logs(run)]

    start = {"gate_domain": 1.0, "gate_domain_target": "best", "gate_domain_steps": 2}
    extra = [a - b for a, b in zip(losses(**start), losses(), strict=True)]
    assert extra[0] > 1.5 * extra[1] > 0
    assert extra[2] == 0


@pytest.mark.parametrize("keep", ["hidden", "top"])
def test_a_gate_from_the_cache_starts_with_the_best_too(keep, fused, tmp_path):
    start = {"gate_domain": 1.0, "gate_domain_target": "best", "max_steps": 1, "learning_rate": 0.0}
    plain = build(GateTrainer, fused, tmp_path / "plain", **start)
    cached = build(
        CachedGateTrainer, fused, tmp_path / "two", cached={"cache": tmp_path / "cache", "keep": keep}, **start
    )
    plain.train(), cached.train()
    assert logs(cached)[0]["loss"] == pytest.approx(logs(plain)[0]["loss"], abs=1e-3)


# -------------------------------------------------------------------------------- the prior on temperatures


def test_the_prior_on_temperatures_is_half_a_square_of_each_log_factor():
    own, domain = weights(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    logs = torch.randn(2, 3, 2, dtype=torch.float64)
    term = gate_terms(settings(gate_scale=0.5), own, domain, [0, 1, 2], torch.zeros(3), 0, scales=logs.exp())
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    torch.testing.assert_close(term, (normal.log_prob(torch.zeros_like(logs)) - normal.log_prob(logs)).sum(-1))


@pytest.mark.parametrize(
    ("gate", "own", "expected"),
    [
        ("cross:8+calibration", {}, 0.5),
        ("cross:8+calibration", {"gate_scale": 0.0}, 0.0),
        ("cross:8", {}, 0.0),
        # another loss in place of TRL's has no place for it
        ("cross:8+calibration", {"label_smoothing_factor": 0.1}, 0.0),
    ],
)
# TRL 2 will have no label smoothing
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor")
def test_gates_with_temperatures_have_the_prior_unless_told_otherwise(gate, own, expected, specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate=gate)
    assert trainer(GateTrainer, model, tmp_path, **own).args.gate_scale == expected


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor")
def test_a_prior_without_effect_is_refused(specialists, tmp_path):
    plain = UltraFuserForCausalLM.from_specialists(specialists, gate="cross:8")
    with pytest.raises(ValueError, match="`gate_scale` is a prior .* 'cross' of this model predicts none"):
        trainer(GateTrainer, plain, tmp_path, gate_scale=0.5)
    able = UltraFuserForCausalLM.from_specialists(specialists, gate="cross:8+calibration")
    with pytest.raises(ValueError, match=r"\['gate_scale'\] are added to TRL's own loss"):
        trainer(GateTrainer, able, tmp_path, gate_scale=0.5, label_smoothing_factor=0.1)


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_the_prior_holds_temperatures_back(fusion, specialists, tmp_path):
    def factor(prior):
        model = UltraFuserForCausalLM.from_specialists(specialists, gate="constant+calibration", fusion=fusion)
        run = trainer(GateTrainer, model, tmp_path, max_steps=30, learning_rate=0.05, gate_scale=prior)
        run.train()
        return sum(abs(math.log(logs(run)[-1][f"gate_scale/{d}"])) for d in run.domains)

    free, held, firmly = (factor(prior) for prior in (0.0, 0.5, 50.0))
    assert free > held > firmly
    assert firmly < 0.1 * free
