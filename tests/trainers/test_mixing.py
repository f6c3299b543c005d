"""Mixes, policies, rewards and guard rails. Numbers of the paper are those of arXiv 2406.08811."""

import json

import numpy as np
import pytest
import torch

from trainers.mix.mix_config import MixConfig
from trainers.mix.mixes import MIXES
from trainers.mix.policies import POLICIES
from trainers.mix.policies.policy_base import Smoothing
from trainers.mix.rewards.reward_base import usable_rewards
from trainers.mix.shares import guarded, importance_weights


# the paper's four datasets, in thousands: Mathematics, Medicine, General, NLP (table 1)
SIZES = np.array([26.2, 5.2, 9.3, 62.6]) * 1000


REWARDS = np.array([0.52, 0.43, 0.59, 0.14])


FIXED_POINT = REWARDS / REWARDS.sum()
UNIFORM, PROPORTIONAL = np.full(4, 0.25), SIZES / SIZES.sum()
# those that go to R / sum R, and settings under which a test can wait for it
CLIMBERS = {
    "logits": {"learning_rate": 1e-2, "inner_steps": 20},
    "mlp": {"optimizer": "adam", "inner_steps": 20},
    "rate": {},
}


def shares(mix, sizes=SIZES, **settings):
    """Of domains "0", "1" and so on."""
    return MIXES[mix](MixConfig(**settings), [str(d) for d in range(len(sizes))]).shares(sizes)


def run(policy, updates, rewards=REWARDS, mix=UNIFORM):
    for _ in range(updates):
        mix = policy.update(rewards, mix)
    return mix


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1, [0.2536, 0.0503, 0.0900, 0.6060]),
        (10, [0.2602, 0.2213, 0.2346, 0.2839]),
        (np.inf, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_temperature_gives_the_shares_of_equation_three(temperature, expected):
    np.testing.assert_allclose(shares("temperature", mix_temperature=temperature), expected, atol=5e-5)


def test_balanced_is_exactly_uniform_and_proportional_is_the_share_of_examples():
    balanced, proportional = shares("balanced"), shares("proportional")
    assert balanced.tolist() == [0.25] * 4
    np.testing.assert_allclose(proportional, SIZES / SIZES.sum())


def test_a_fixed_mix_takes_any_scale_and_may_leave_a_domain_out():
    for weights in ({"0": 3, "1": 1, "2": 0}, {"0": 3, "1": 1}):
        assert shares("fixed", [5, 5, 5], mix_weights=weights).tolist() == [0.75, 0.25, 0]


@pytest.mark.parametrize(
    ("mix", "sizes", "settings", "message"),
    [
        ("balanced", [3, 0], {}, r"at least one example.*\[3, 0\]"),
        ("temperature", [1, 2], {"mix_temperature": 0}, "above 0, but is 0"),
        ("fixed", [1, 2], {}, r"one finite weight per domain.*\[0.0, 0.0\] for 2 domains"),
        ("fixed", [1, 2], {"mix_weights": {"0": 1, "1": -1}}, r"none negative.*\[1, -1\]"),
        ("fixed", [1, 2], {"mix_weights": {"0": 1, "1": float("nan")}}, "finite"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_in_words(mix, sizes, settings, message):
    with pytest.raises(ValueError, match=message):
        shares(mix, sizes, **settings)


def test_the_authors_code_gives_this_trace_on_constant_rewards():
    """Logits, 200 steps of Adam at 1e-4, smoothing 0.9 from 1."""
    policy, smoothing, mix, trace = POLICIES["logits"](UNIFORM), Smoothing(4), UNIFORM, []
    for _ in range(48):
        mix = policy.update(smoothing.update(REWARDS), mix)
        trace.append(mix)
    expected = {
        1: [0.2526, 0.2521, 0.2526, 0.2428],
        5: [0.2638, 0.2550, 0.2643, 0.2169],
        10: [0.2758, 0.2554, 0.2782, 0.1906],
        20: [0.2928, 0.2557, 0.3025, 0.1490],
        48: [0.3089, 0.2559, 0.3479, 0.0873],
    }
    np.testing.assert_allclose([trace[n - 1] for n in expected], list(expected.values()), atol=6e-5)


@pytest.mark.grid
@pytest.mark.parametrize("name", CLIMBERS)
def test_learned_mixes_end_where_rewards_point(name):
    np.testing.assert_allclose(FIXED_POINT, [0.3095, 0.2560, 0.3512, 0.0833], atol=5e-5)
    for prior in (UNIFORM, PROPORTIONAL):
        end = run(POLICIES[name](prior, **CLIMBERS[name]), 120, mix=prior)
        np.testing.assert_allclose(end, FIXED_POINT, atol=1e-3)


@pytest.mark.parametrize("name", CLIMBERS)
def test_a_mix_that_is_where_rewards_point_stays_there(name):
    # Adam makes steps of rounding errors and never rests
    settings = {} if name == "rate" else {"optimizer": "sgd", "inner_steps": 200, "learning_rate": 0.1}
    end = run(POLICIES[name](FIXED_POINT, **settings), 5, mix=FIXED_POINT)
    np.testing.assert_allclose(end, FIXED_POINT, atol=1e-12)


def test_the_mlp_at_the_papers_rate_hardly_moves():
    mix = run(POLICIES["mlp"](UNIFORM), 48)
    np.testing.assert_allclose(mix, [0.257, 0.251, 0.262, 0.231], atol=2e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["logits", "mlp"])
def test_scorers_take_the_steps_that_autograd_and_torch_take(name, optimizer):
    prior = PROPORTIONAL
    policy = POLICIES[name](prior, optimizer=optimizer, inner_steps=30, learning_rate=1e-2)
    twin = torch.tensor(policy.parameters, requires_grad=True)
    torch_optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]([twin], lr=1e-2)
    mix = prior
    for rewards in np.random.default_rng(0).uniform(size=(3, 4)):
        mix = policy.update(rewards, mix)
        for _ in range(30):
            torch_optimizer.zero_grad()
            logs = twin_scores(name, twin).log_softmax(0)
            (-(torch.tensor(rewards) * logs).sum()).backward()
            torch_optimizer.step()
        np.testing.assert_allclose(mix, twin_scores(name, twin).softmax(0).detach(), rtol=1e-6)


def twin_scores(name, parameters):
    if name == "logits":
        return parameters
    first, last = parameters.split(len(parameters) // 2)
    return last.view(4, -1) @ (first.view(-1, 4) @ torch.ones(4, dtype=torch.float64)).relu()


@pytest.mark.parametrize("name", ["logits", "mlp"])
def test_a_scorer_starts_at_its_prior_exactly(name):
    prior = PROPORTIONAL
    np.testing.assert_allclose(POLICIES[name](prior, inner_steps=0).update(REWARDS, prior), prior, rtol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_equal_rewards_leave_a_uniform_mix_as_it_is(name):
    policy, mix = POLICIES[name](UNIFORM), UNIFORM
    returned = []
    for _ in range(16):
        mix = policy.update(np.ones(4), mix)
        returned.append(mix)
    if name == "aioli":  # every other update of it is a measurement
        returned = [returned[4 + i] for i in range(4)]
    np.testing.assert_allclose(returned, UNIFORM[None].repeat(len(returned), 0), atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_a_masked_domain_has_no_share_and_the_others_share_one(name):
    prior = np.array([0.5, 0.0, 0.25, 0.25])
    policy, mix = POLICIES[name](prior), prior
    for _ in range(20):
        mix = policy.update(np.array([0.5, 9.0, 0.3, 0.2]), mix)
        assert mix[1] == 0
        assert (mix[[0, 2, 3]] > 0).all()
        assert mix.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_a_domain_masked_on_the_way_stays_out(name):
    policy = POLICIES[name](UNIFORM)
    mix = run(policy, 6)
    mix = run(policy, 6, mix=guarded(mix, epochs=np.array([0, 3, 0, 0]), max_epochs=3))
    assert mix[1] == 0
    assert mix.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", CLIMBERS)
def test_domains_left_by_a_masked_one_end_where_their_rewards_point(name):
    prior = np.array([0.0, 0.25, 0.25, 0.5])
    end = run(POLICIES[name](prior, **CLIMBERS[name]), 120, mix=prior)
    np.testing.assert_allclose(end, [0, *(REWARDS[1:] / REWARDS[1:].sum())], atol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_resumed_through_json_goes_on_exactly(name):
    rewards = np.random.default_rng(0).uniform(0.1, 2, size=(14, 4))
    whole, first, second = (POLICIES[name](UNIFORM) for _ in range(3))
    mix = mix_of_halves = UNIFORM
    for n, reward in enumerate(rewards):
        if n == 3:  # in the middle of aioli's sweep
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        mix = whole.update(reward, mix)
        mix_of_halves = (first if n < 3 else second).update(reward, mix_of_halves)
        assert mix.tolist() == mix_of_halves.tolist()
    assert POLICIES[name](UNIFORM).update(rewards[-1], mix).tolist() != mix.tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_saved_does_not_change_afterwards(name):
    policy = POLICIES[name](UNIFORM)
    run(policy, 3)
    saved = policy.state_dict()
    copy = json.dumps(saved)
    run(policy, 3, rewards=REWARDS[::-1])
    assert json.dumps(saved) == copy != json.dumps(policy.state_dict())


def test_a_policy_refuses_the_memory_of_another():
    with pytest.raises(ValueError, match="RatePolicy has .*saved state"):
        POLICIES["rate"](UNIFORM).load_state_dict(POLICIES["ucb"](UNIFORM[:3]).state_dict())
    with pytest.raises(ValueError, match="start a new run"):
        POLICIES["rate"](UNIFORM).load_state_dict(POLICIES["logits"](UNIFORM).state_dict())
    with pytest.raises(ValueError, match="Unknown optimizer 'lion'"):
        POLICIES["mlp"](UNIFORM, optimizer="lion")


def test_rate_goes_its_share_of_the_way():
    mix = POLICIES["rate"](UNIFORM, rate=0.25).update(np.array([1.0, 0, 0, 0]), UNIFORM)
    np.testing.assert_allclose(mix, 0.75 * UNIFORM + 0.25 * np.array([1, 0, 0, 0]))


def test_a_floor_does_not_creep_into_the_memory_of_rate():
    policy, mix = POLICIES["rate"](UNIFORM), UNIFORM
    for _ in range(200):
        mix = guarded(policy.update(REWARDS, mix), floor=0.05)
    np.testing.assert_allclose(mix, 0.8 * FIXED_POINT + 0.05, atol=1e-6)


def test_exp3_follows_its_formula():
    policy, mix, gains, domains = POLICIES["exp3"](UNIFORM), UNIFORM, np.zeros(4), 4
    explore = [1 / 4] + [min(1 / 4, np.sqrt(np.log(4) / (4 * t))) for t in range(1, 41)]
    for t in range(1, 41):
        gains = gains + 0.1 * REWARDS / mix
        powers = np.exp(explore[t - 1] * gains)
        mix = policy.update(REWARDS, mix)
        np.testing.assert_allclose(mix, (1 - domains * explore[t]) * powers / powers.sum() + explore[t])
    assert mix.argmax() == REWARDS.argmax()


def test_ucb_draws_what_was_seldom_drawn():
    mix = POLICIES["ucb"](UNIFORM).update(np.ones(4), np.array([0.7, 0.1, 0.1, 0.1]))
    assert mix[0] < 0.25 < mix[1]


def test_a_share_that_rounds_to_nothing_does_not_mask_its_domain():
    policy = POLICIES["skill_it"](UNIFORM, window=1)
    assert run(policy, 1, rewards=np.array([1e5, 0, 0, 0])).min() > 0
    np.testing.assert_allclose(run(policy, 1, rewards=np.zeros(4)), UNIFORM)


def test_skill_it_weighs_the_losses_of_its_window_by_the_graph():
    graph = np.eye(4)
    graph[3, 0] = 1.0  # training on the last domain helps the first
    policy = POLICIES["skill_it"](UNIFORM, eta=0.5, window=2, graph=graph)
    losses = np.random.default_rng(0).uniform(size=(3, 4))
    for loss in losses:
        mix = policy.update(loss, UNIFORM)
    powers = np.exp(0.5 * (losses[1:].sum(0) + np.array([0, 0, 0, losses[1:, 0].sum()])))
    np.testing.assert_allclose(mix, powers / powers.sum())


def test_aioli_finds_which_domain_helps_which():
    """In a world where losses fall by A @ mix, one sweep tells A."""
    helps = np.random.default_rng(0).uniform(0.1, 1, size=(4, 4))
    policy, losses, mix = POLICIES["aioli"](UNIFORM, eta=2.0), np.full(4, 50.0), UNIFORM
    for _ in range(5):
        mix = policy.update(losses, mix)
        losses = losses - helps @ mix
    powers = np.exp(2.0 * helps.sum(0) / helps.sum())
    np.testing.assert_allclose(mix, powers / powers.sum())
    assert policy.update(losses, mix).tolist() == mix.tolist()  # it holds between two sweeps


def test_negative_rewards_count_as_none():
    assert usable_rewards([-1.0, 2.0], np.array([0.5, 0.5]), ["a", "b"]).tolist() == [0, 2]


@pytest.mark.grid
@pytest.mark.parametrize("name", CLIMBERS)
def test_clipped_rewards_keep_every_mix_finite(name):
    rewards = usable_rewards([-1.0, 0.4, 0.4, -3.0], UNIFORM, list("abcd"))
    mix = run(POLICIES[name](UNIFORM, **CLIMBERS[name]), 300, rewards=rewards)
    np.testing.assert_allclose(mix[1:3], 0.5, atol=0.02)
    assert (mix > 0).all()


def test_no_reward_at_all_leaves_the_mix_as_it_is():
    for name in CLIMBERS:
        np.testing.assert_allclose(run(POLICIES[name](UNIFORM), 3, rewards=np.zeros(4)), UNIFORM)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_freezes_the_mix_and_names_the_domain(broken):
    with pytest.warns(UserWarning, match=r"not finite: \{'code'"):
        assert usable_rewards([1.0, broken], np.array([0.5, 0.5]), ["text", "code"]) is None


def test_a_masked_domain_needs_no_reward():
    assert usable_rewards([1.0, float("nan")], np.array([1.0, 0.0]), ["text", "code"]).tolist() == [1, 0]


def test_a_floor_is_the_smallest_share():
    np.testing.assert_allclose(guarded(np.array([1 - 1e-9, 1e-9]), floor=0.2), [0.8, 0.2])
    np.testing.assert_allclose(guarded(FIXED_POINT, floor=0.05), 0.8 * FIXED_POINT + 0.2 / 4)
    np.testing.assert_allclose(guarded(FIXED_POINT, floor=0.25), UNIFORM)


def test_a_floor_does_not_lift_a_masked_domain():
    np.testing.assert_allclose(guarded(np.array([0.9, 0.1, 0.0]), floor=0.2), [0.74, 0.26, 0])


@pytest.mark.parametrize("floor", [0.3, -0.1])
def test_floors_that_cannot_all_be_met_are_refused(floor):
    with pytest.raises(ValueError, match=f"4 domains times floor={floor}.*at most 0.25"):
        guarded(UNIFORM, floor=floor)


def test_a_domain_at_its_cap_leaves_and_the_others_share_its_part():
    mix = guarded(np.array([0.5, 0.3, 0.2]), epochs=np.array([2.9, 3.0, 0.1]), max_epochs=3)
    np.testing.assert_allclose(mix, [5 / 7, 0, 2 / 7])


def test_without_a_domain_below_the_cap_the_cap_is_lifted_with_a_warning():
    with pytest.warns(UserWarning, match="seen 3 times"):
        mix = guarded(np.array([0.6, 0.4, 0.0]), epochs=np.array([3.0, 4.0, 0.0]), max_epochs=3)
    np.testing.assert_allclose(mix, [0.6, 0.4, 0])


def test_importance_weights_bring_the_objective_back():
    mix = np.array([0.7, 0.2, 0.1])
    np.testing.assert_allclose(mix * importance_weights(mix), 1 / 3)
    assert importance_weights(np.array([0.5, 0.5, 0.0])).tolist() == [1, 1, 0]


def test_epochs_of_the_papers_run_under_each_mix():
    """Three epochs of 103.4 thousand examples in batches of 64, a mix every 100 steps."""
    draws = 3 * 103.4e3
    assert (round(draws / 64), int(draws / 64) // 100) == (4847, 48)
    expected = {1: [3.0, 3.0, 3.0, 3.0], 10: [3.1, 13.2, 7.8, 1.4], np.inf: [3.0, 14.9, 8.3, 1.2]}
    for temperature, epochs in expected.items():
        mix = shares("temperature", mix_temperature=temperature)
        np.testing.assert_allclose(mix * draws / SIZES, epochs, atol=0.06)
