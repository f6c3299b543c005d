"""Rewards of a learned mix, and how they are smoothed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from trainers.mix.mix_config import MixConfig
from trainers.mix.policies.policy_base import Smoothing
from trainers.mix.rewards import REWARDS as KINDS
from trainers.mix.rewards.reward_difficulty import difficulty


# perplexities of Llama-3-8B before and after training (table 6)
START, END = np.array([5.65, 5.86, 4.25, 29.79]), np.array([2.94, 2.51, 2.51, 4.19])


REWARDS = np.array([0.52, 0.43, 0.59, 0.14])


UNIFORM = np.full(4, 0.25)


def measured(reward, target=None, **probe):
    """A reward of domains "0", "1" and so on, from what a probe finds."""
    args = MixConfig(mix_reward=reward, mix_target=None if target is None else str(target))
    args.packing = args.padding_free = False
    probe = SimpleNamespace(domains=list("0123"), sharded=False, stage="gate", **probe)
    return KINDS[reward](args, probe).measure()


def similarity(z, target=None):
    return measured("similarity", target, mean_hidden_states=lambda: z)


def test_beta_multiplies_the_new_reward_and_smoothing_starts_from_one():
    smoothing = Smoothing(2, beta=0.9)
    np.testing.assert_allclose(smoothing.update(np.array([2.0, 0.0])), [1.9, 0.1])
    np.testing.assert_allclose(smoothing.update(np.array([0.0, 0.0])), [0.19, 0.01])  # of the smoothed, not the raw


def test_smoothing_leaves_beta_over_two_minus_beta_of_the_variance():
    raw = np.random.default_rng(0).normal(size=20000)
    smoothing = Smoothing(1, beta=0.9)
    smoothed = np.array([smoothing.update(value)[0] for value in raw])
    assert smoothed.var() / raw.var() == pytest.approx(0.9 / 1.1, abs=0.02)


def test_smoothing_resumes_exactly_and_refuses_a_beta_that_never_listens():
    first, second = Smoothing(4), Smoothing(4)
    first.update(REWARDS)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.update(UNIFORM).tolist() == second.update(UNIFORM).tolist()
    with pytest.raises(ValueError, match="above 0"):
        Smoothing(4, beta=0.0)


def test_similarity_counts_each_domain_with_itself():
    np.testing.assert_allclose(similarity(np.eye(4)), 0.25)
    np.testing.assert_allclose(similarity(np.array([[1.0, 0], [1, 1]])), (1 + np.sqrt(0.5)) / 2)


def test_similarity_knows_neither_scale_nor_order():
    z = np.random.default_rng(0).normal(size=(4, 7))
    np.testing.assert_allclose(similarity(z * [[1], [20], [0.3], [5]]), similarity(z))
    np.testing.assert_allclose(similarity(z[[2, 0, 3, 1]]), similarity(z)[[2, 0, 3, 1]])


def test_similarity_to_a_target_is_one_for_the_target_alone():
    z = np.random.default_rng(0).normal(size=(4, 7))
    towards = similarity(z, target=2)
    assert towards[2] == pytest.approx(1)
    assert (np.delete(towards, 2) < 1).all()
    assert towards[0] == pytest.approx(z[0] @ z[2] / np.linalg.norm(z[0]) / np.linalg.norm(z[2]))


def test_difficulty_is_a_mean_of_ratios_and_one_at_the_start():
    nll = np.array([1.0, 2.0, 0.5])
    assert difficulty(nll, nll) == 1
    start, now = np.array([2.0, 4.0]), np.array([1.0, 3.5])
    assert difficulty(now, start) == pytest.approx((np.exp(-1) + np.exp(-0.5)) / 2)


def test_ratios_of_average_perplexities_are_those_of_table_six():
    np.testing.assert_allclose(
        [difficulty([np.log(e)], [np.log(s)]) for e, s in zip(END, START, strict=True)], REWARDS, atol=5e-3
    )


def test_regret_is_one_where_fusing_costs_nothing_and_more_where_it_harms():
    own = np.array([1.0, 2.0])
    assert measured("regret", batch_losses=lambda: (own, own)).tolist() == [1, 1]
    assert measured("regret", batch_losses=lambda: (own + np.log(2), own)) == pytest.approx(2)


def test_gradient_cosine_rewards_the_training_gradient_that_agrees_with_held_out_ones():
    dev = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    train = np.array([[1.0, 0, 0], [2, 2, 2], [0, 0, -3]])
    found = measured("gradient", gradients=[dev, train].__getitem__)
    np.testing.assert_allclose(found, [1 / 3, 1 / np.sqrt(3), -1 / 3])


def test_gradients_towards_a_target_are_rewarded_by_their_cosine_to_the_targets():
    orthogonal = np.diag([1.0, 2.0, 3.0])
    assert measured("gradient", 2, gradients=[orthogonal, orthogonal].__getitem__).tolist() == [0, 0, 1]
    leaning = np.array([[1.0, 0, 1], [0, 1, 0], [0, 0, 5]])
    np.testing.assert_allclose(
        measured("gradient", 2, gradients=[orthogonal, leaning].__getitem__), [np.sqrt(0.5), 0, 1]
    )


def test_a_target_is_rewarded_twice_and_the_others_as_before():
    def loss(rewards, target):
        return measured("loss", target, batch_losses=lambda: (rewards, None))

    np.testing.assert_allclose(loss(REWARDS, 2), [0.52, 0.43, 1.18, 0.14])
    doubled = loss(np.array([0.283, 0.202, 0.332, 0.184]), 0)
    # from the end of figure 2b to the end of figure 4, read off to 0.005
    np.testing.assert_allclose(doubled / doubled.sum(), [0.44, 0.16, 0.26, 0.145], atol=5e-3)
