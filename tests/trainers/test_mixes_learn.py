"""Learned mixes on tables of words that are learnt fast, slowly or not at all."""

import numpy as np
import pytest

from trainers.mix.policies import POLICIES
from trainers.mix.policies.policy_base import Smoothing
from trainers.mix.rewards.reward_base import usable_rewards
from trainers.mix.rewards.reward_difficulty import difficulty
from trainers.mix.shares import guarded


# those that go to R / sum R, and settings under which a test can wait for it
CLIMBERS = {
    "logits": {"learning_rate": 1e-2, "inner_steps": 20},
    "mlp": {"optimizer": "adam", "inner_steps": 20},
    "rate": {},
}


WORDS = 8


class Tables:
    """Domains to learn, as tables from context to next word; one of no contexts is noise, for ever new."""

    def __init__(self, contexts, seed=0):
        self.random = np.random.default_rng(seed)
        self.answers = [self.random.integers(WORDS, size=n) for n in contexts]
        self.logits = [np.zeros((max(n, 1), WORDS)) for n in contexts]

    def examples(self, domain, number):
        if not len(self.answers[domain]):
            return np.zeros(number, dtype=int), self.random.integers(WORDS, size=number)
        contexts = self.random.integers(len(self.answers[domain]), size=number)
        return contexts, self.answers[domain][contexts]

    def nll(self, domain, contexts, words):
        logits = self.logits[domain][contexts]
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(words)), words]

    def step(self, mix):
        counts = self.random.multinomial(32, mix)
        for domain, number in enumerate(counts):
            contexts, words = self.examples(domain, number)
            logits = self.logits[domain]
            shares = np.exp(logits[contexts]) / np.exp(logits[contexts]).sum(1, keepdims=True)
            np.add.at(logits, contexts, 0.1 * (np.eye(WORDS)[words] - shares))
        return counts

    def difficulties(self):
        probes = [self.examples(domain, 256) for domain in range(len(self.logits))]
        return [difficulty(self.nll(d, *probe), np.log(WORDS)) for d, probe in enumerate(probes)]

    def train(self, policy=None, sizes=None, **bounds):
        """40 updates of 10 steps each. Returns the mixes and the numbers of draws, one row per update."""
        domains = len(self.logits)
        smoothing, mix = Smoothing(domains), np.full(domains, 1 / domains)
        mixes, draws = [], [np.zeros(domains)]
        for _ in range(40):
            rewards = usable_rewards(self.difficulties(), mix, range(domains))
            if policy is not None:
                epochs = None if sizes is None else draws[-1] / sizes
                mix = guarded(policy.update(smoothing.update(rewards), mix), epochs=epochs, **bounds)
            mixes.append(mix)
            draws.append(draws[-1] + sum(self.step(mix) for _ in range(10)))
        return np.array(mixes), np.array(draws)


EASY, SLOW, NOISE = 4, 1024, 0


@pytest.mark.parametrize("name", CLIMBERS)
def test_difficulty_draws_more_of_what_is_slowly_learnt_and_it_is_learnt_better(name):
    learned, balanced = Tables([EASY, SLOW]), Tables([EASY, SLOW])
    mixes, _ = learned.train(POLICIES[name](np.full(2, 0.5), **CLIMBERS[name]))
    balanced.train()
    np.testing.assert_allclose(mixes[0], 0.5, atol=2e-3)  # nothing is known of the domains before training
    assert mixes[-1][1] > 0.7
    assert learned.difficulties()[1] < balanced.difficulties()[1] - 0.1


def test_difficulty_draws_noise_most_of_all_although_there_is_nothing_to_learn():
    """The known failure of this reward, kept in sight: what stays hard is not always worth learning."""
    mixes, _ = Tables([EASY, SLOW, NOISE]).train(POLICIES["rate"](np.full(3, 1 / 3)))
    easy, slow, noise = mixes[-1]
    assert noise > 0.5 > slow > easy


def test_a_floor_bounds_what_noise_takes():
    mixes, _ = Tables([EASY, SLOW, NOISE]).train(POLICIES["rate"](np.full(3, 1 / 3)), floor=0.2)
    assert (mixes >= 0.2 - 1e-12).all()
    assert mixes[-1][2] < 0.5


def test_a_cap_ends_what_noise_takes_and_the_slow_domain_gets_it():
    mixes, draws = Tables([EASY, SLOW, NOISE]).train(
        POLICIES["rate"](np.full(3, 1 / 3)), sizes=[1e9, 1e9, 1000], max_epochs=3
    )
    left = np.flatnonzero(mixes[:, 2] == 0)[0]
    assert 0 < left < 30
    assert (mixes[left:, 2] == 0).all()
    assert 3000 <= draws[-1][2] <= 3000 + 320  # what is drawn between two updates
    assert mixes[-1].argmax() == 1
