"""Policies: how a learned mix follows its rewards.

A policy is made with the prior, shape (domains,), and answers rewards with a mix, both float64 of that shape. Its
`state_dict()` is all that the next answer depends on. "The paper" is Mixture-of-Skills (Wu et al., 2024,
https://arxiv.org/abs/2406.08811).
"""

import math

import numpy as np
from numpy import ndarray

from .mixing import softmax


class _Stateful:
    """Arrays that are saved as lists, and come back exactly: JSON keeps every digit of a float64."""

    memory: tuple[str, ...]

    def state_dict(self) -> dict:
        """What an update reads and writes, as numbers and lists. Settings are not in it."""
        return {name: getattr(self, name).tolist() for name in self.memory}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()` of an object with the same settings."""
        saved = {name: np.asarray(value) for name, value in state.items()}
        here = {name: getattr(self, name) for name in self.memory}
        shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (here, saved)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"A learned mix resumes with the policy, the settings and the domains it was saved with, but "
                f"{type(self).__name__} has {shapes[0]} and the saved state {shapes[1]}. Resume with those, or start "
                f"a new run."
            )
        for name, array in here.items():
            setattr(self, name, saved[name].astype(array.dtype))


class Smoothing(_Stateful):
    """R = beta R' + (1 - beta) R'', with R' the new reward and R'' the last *smoothed* one (Eq. 11).

    Beta multiplies the NEW reward: the paper's 0.9 is light smoothing, which takes away 18% of the variance; 0.1 takes
    away 95%, and 1 switches smoothing off. Where the paper is silent, this is its authors' code: recursive, from 1.
    """

    memory = ("value",)

    def __init__(self, domains: int, beta: float = 0.9):
        if not 0 < beta <= 1:
            raise ValueError(f"beta is the share of the new reward, above 0 and at most 1, but is {beta}.")
        self.beta = beta
        self.value = np.ones(domains)

    def update(self, rewards: ndarray) -> ndarray:
        """Takes the new rewards in and returns the smoothed ones. Shape (domains,)."""
        self.value = self.beta * rewards + (1 - self.beta) * self.value
        return self.value


class _Scorer(_Stateful):
    """Scores of the domains, climbing sum_i R_i log p_i with p = softmax(scores) (Eq. 6).

    All domains count alike in that sum, whatever their share, so it is a cross-entropy and has one optimum:
    p = R / sum R. Everything else here sets the speed at which p goes there. Adam never quite rests there: of a
    vanishing gradient it still makes steps of the learning rate.
    """

    memory = ("parameters", "mean", "square", "steps")

    def __init__(self, parameters: ndarray, learning_rate: float, inner_steps: int, optimizer: str):
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"Unknown optimizer {optimizer!r}. Choose 'sgd' or 'adam'.")
        self.parameters, self.learning_rate = parameters, learning_rate
        self.inner_steps, self.optimizer = inner_steps, optimizer
        self.mean, self.square = np.zeros_like(parameters), np.zeros_like(parameters)
        self.steps = np.array(0)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen = mix > 0
        rewards = np.where(seen, rewards, 0)
        for _ in range(self.inner_steps):
            # of -sum_i R_i log p_i, with respect to the scores
            self._descend(self._gradient(softmax(self._scores(), seen) * rewards.sum() - rewards))
        return softmax(self._scores(), seen)

    def _scores(self) -> ndarray:
        raise NotImplementedError

    def _gradient(self, by_scores: ndarray) -> ndarray:
        raise NotImplementedError

    def _descend(self, gradient: ndarray) -> None:
        if self.optimizer == "adam":  # betas and epsilon as in torch.optim.Adam
            self.steps = self.steps + 1
            self.mean = 0.9 * self.mean + 0.1 * gradient
            self.square = 0.999 * self.square + 0.001 * gradient**2
            gradient = self.mean / (1 - 0.9**self.steps)
            gradient = gradient / (np.sqrt(self.square / (1 - 0.999**self.steps)) + 1e-8)
        self.parameters = self.parameters - self.learning_rate * gradient


class Logits(_Scorer):
    """Mixture-of-Skills as its authors' code has it: one number per domain, 200 steps of Adam at every update.

    No score moves by much more than 200 * 1e-4 = 0.02 per update.
    """

    def __init__(
        self, prior: ndarray, *, learning_rate: float = 1e-4, inner_steps: int = 200, optimizer: str = "adam"
    ):
        super().__init__(_log_prior(prior), learning_rate, inner_steps, optimizer)

    def _scores(self) -> ndarray:
        return self.parameters

    def _gradient(self, by_scores: ndarray) -> ndarray:
        return by_scores


class MLP(_Scorer):
    """Mixture-of-Skills as the paper has it: a two-layer perceptron and one plain step at every update (Algorithm 1).

    Its input says which domains the prior admits, and never changes. The paper gives the rate, but no width,
    activation or optimizer, although these decide between a mix that hardly moves and one that jumps to R / sum R: at
    the defaults it hardly moves. Width 128, ReLU and no biases are choices made here. Weights are drawn from
    N(0, 1 / inputs), and the last layer is then changed as little as makes the mix start at the prior.
    """

    def __init__(
        self,
        prior: ndarray,
        *,
        learning_rate: float = 1e-4,
        inner_steps: int = 1,
        optimizer: str = "sgd",
        width: int = 128,
        seed: int = 0,
    ):
        target = _log_prior(prior)
        self.accessible = (prior > 0).astype(np.float64)
        random = np.random.default_rng(seed)
        first = random.normal(size=(width, len(prior))) / math.sqrt(len(prior))
        last = random.normal(size=(len(prior), width)) / math.sqrt(width)
        hidden = (first @ self.accessible).clip(min=0)
        last += np.outer(target - last @ hidden, hidden / (hidden @ hidden))
        self.width = width
        super().__init__(np.concatenate([first.ravel(), last.ravel()]), learning_rate, inner_steps, optimizer)

    def _layers(self) -> tuple[ndarray, ndarray]:
        first, last = np.split(self.parameters, 2)
        return first.reshape(self.width, -1), last.reshape(-1, self.width)

    def _scores(self) -> ndarray:
        first, last = self._layers()
        return last @ (first @ self.accessible).clip(min=0)

    def _gradient(self, by_scores: ndarray) -> ndarray:
        first, last = self._layers()
        hidden = (first @ self.accessible).clip(min=0)
        by_first = np.outer((by_scores @ last) * (hidden > 0), self.accessible)
        return np.concatenate([by_first.ravel(), np.outer(by_scores, hidden).ravel()])


class Rate(_Stateful):
    """Goes a share `rate` of the way to R / sum R at every update: p = (1 - rate) p + rate R / sum R.

    Mixture-of-Skills without the scorer: the same end, and one setting that can be read, since the mix remembers about
    1 / rate updates.
    """

    memory = ("shares",)

    def __init__(self, prior: ndarray, *, rate: float = 0.1):
        self.rate = rate
        # not read from the mix in force: a floor would be added anew at every update
        self.shares = np.asarray(prior, dtype=np.float64)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen = mix > 0
        self.shares = np.where(seen, self.shares, 0) / self.shares[seen].sum()
        total = rewards[seen].sum()
        if total > 0:
            shares = (1 - self.rate) * self.shares + self.rate * np.where(seen, rewards, 0) / total
            # a share of 0 would mask its domain for good
            self.shares = np.where(seen, shares.clip(min=1e-300), 0)
        return self.shares


class Exp3(_Stateful):
    """Online Data Mixing (Albalak et al., 2023, arXiv 2312.02406), with losses as rewards.

    At update t, with K domains, G = G + scale R / p; e_t = min(1/K, sqrt(ln K / (K t)));
    p = (1 - K e_t) softmax(e_{t-1} G) + e_t, which explores less and less. Scale 0.1 is the authors' code.
    Simplified: they reward one drawn domain per step, which is what dividing by p corrects for, and count steps in t.
    Here every domain is rewarded at every update, and t counts updates. The prior is forgotten at the first update.
    """

    memory = ("gains", "updates")

    def __init__(self, prior: ndarray, *, scale: float = 0.1):
        self.scale = scale
        self.gains = np.zeros(len(prior))
        self.updates = np.array(0)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen = mix > 0
        domains = seen.sum()
        self.gains = self.gains + self.scale * np.where(seen, rewards, 0) / np.where(seen, mix, 1)
        before, now = (
            min(1 / domains, math.sqrt(math.log(domains) / (domains * max(t, 1))))
            for t in (self.updates, self.updates + 1)
        )
        self.updates = self.updates + 1
        return (1 - domains * now) * softmax(before * self.gains, seen) + now * seen


class UCB(_Stateful):
    """Softmax of reward + sqrt(2 ln(n + 1) / (n_i + 1)): what is rewarding, or seldom drawn (DUMP, arXiv 2504.09710).

    Simplified: n_i is the sum of the domain's shares of the mix, in updates, not a count of examples; the reward is
    the last one, smoothed by the caller, not a mean over a window. The prior is forgotten at the first update.
    """

    memory = ("shares",)

    def __init__(self, prior: ndarray, *, temperature: float = 1.0):
        self.temperature = temperature
        self.shares = np.zeros(len(prior))

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        self.shares = self.shares + mix
        bonus = np.sqrt(2 * math.log(self.shares.sum() + 1) / (self.shares + 1))
        return softmax((rewards + bonus) / self.temperature, mix > 0)


class SkillIt(_Stateful):
    """Skill-It (Chen et al., 2023, arXiv 2307.14430): p_i = prior_i exp(eta sum_j A_ij L_j), normalised.

    L is the sum of the last `window` losses, so the rewards must be losses, unsmoothed. A_ij says how much training on
    domain i helps domain j. Simplified: the paper measures A beforehand with runs of its own; here it is given, and
    otherwise the identity, which leaves every domain to its own loss.
    """

    memory = ("losses",)

    def __init__(self, prior: ndarray, *, eta: float = 0.2, window: int = 3, graph: ndarray | None = None):
        self.prior, self.eta = _log_prior(prior), eta
        self.graph = np.eye(len(prior)) if graph is None else np.asarray(graph, dtype=np.float64)
        self.losses = np.zeros((window, len(prior)))

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        self.losses = np.vstack([self.losses[1:], rewards])
        return softmax(self.prior + self.eta * self.graph @ self.losses.sum(0), mix > 0)


class Aioli(_Stateful):
    """Aioli (Chen et al., 2024, arXiv 2411.05735): p_j = prior_j exp(eta sum_i A_ij), normalised.

    A_ij says how much the loss of domain i falls while domain j is trained. It is measured: the mix leans on each
    domain in turn for one update, and drops of losses = A @ mix is solved for A. Then the resulting mix holds for
    `hold` updates, and the next sweep begins. The rewards must be losses, unsmoothed. Simplified: one sweep per
    estimate, in a fixed order, no moving average, and each new mix starts from the prior.
    """

    memory = ("losses", "mixes", "drops", "gains", "updates")

    def __init__(self, prior: ndarray, *, eta: float = 1.0, lean: float = 0.75, hold: int = 4):
        self.prior, self.eta, self.lean, self.hold = _log_prior(prior), eta, lean, hold
        domains = len(prior)
        self.losses, self.gains = np.zeros(domains), np.zeros(domains)
        self.mixes, self.drops = np.zeros((domains, domains)), np.zeros((domains, domains))
        self.updates = np.array(0)

    def update(self, rewards: ndarray, mix: ndarray) -> ndarray:
        seen, domains = mix > 0, len(mix)
        turn = int(self.updates) % (domains + self.hold)
        if 1 <= turn <= domains:  # the mix that has just been in force belongs to a sweep
            self.mixes = np.vstack([self.mixes[1:], mix])
            self.drops = np.vstack([self.drops[1:], np.where(seen, self.losses - rewards, 0)])
        if turn == domains:
            # least squares, because a domain masked in mid-sweep leaves fewer mixes than domains
            graph = np.linalg.lstsq(self.mixes, self.drops, rcond=None)[0].T
            graph = graph - min(graph.min(), 0)
            self.gains = graph.sum(0) / max(graph.sum(), np.finfo(float).tiny)
        self.losses, self.updates = rewards, self.updates + 1
        if turn < domains and seen[turn]:
            others = seen & (np.arange(domains) != turn)
            leaning = np.where(others, (1 - self.lean) / max(others.sum(), 1), 0)
            leaning[turn] = 1 - leaning.sum()
            return leaning
        return softmax(self.prior + self.eta * self.gains, seen)


# Made with the prior, shape (domains,), and settings by keyword. Then `update(rewards, mix in force)` returns the next
# mix, all of shape (domains,), and `state_dict()` and `load_state_dict(state)` make a resumed run go on exactly.
POLICIES: dict[str, type] = {
    "logits": Logits,
    "mlp": MLP,
    "rate": Rate,
    "exp3": Exp3,
    "ucb": UCB,
    "skill_it": SkillIt,
    "aioli": Aioli,
}


def _log_prior(prior: ndarray) -> ndarray:
    # masked domains get a finite score, which JSON can hold; `softmax` masks them
    return np.log(np.where(prior > 0, prior, 1))
