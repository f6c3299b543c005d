"""Which domain how often: fixed mixes, mixes that learn from rewards, and what keeps them within bounds.

Everything here is arithmetic on one number per domain. A *mix* is a float64 vector of shape (domains,) that sums to 1;
a domain whose share is 0 is masked, and stays so. *Rewards* are what a learned mix receives, shape (domains,). A
trainer that learns its mix does, every so many steps:

    rewards = usable_rewards(measured, mix, names)
    if rewards is not None:
        mix = guarded(policy.update(smoothing.update(rewards), mix), floor=..., epochs=..., max_epochs=...)

"The paper" is Mixture-of-Skills (Wu et al., 2024, https://arxiv.org/abs/2406.08811). Balanced data is hard to beat:
that paper reports single runs, and Aioli's (arXiv 2411.05735) finds that no learned mix before it did so consistently.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy import ndarray


def static_mix(
    kind: str, sizes: Sequence[int], *, temperature: float = 10.0, weights: Sequence[float] | None = None
) -> ndarray:
    """A mix that does not learn, and the one that a learned mix starts from.

    Args:
        kind: "balanced": the same share for every domain. "proportional": that of its examples, n_i / sum n.
            "temperature": proportional to n_i^(1 / temperature) (Eq. 3), between the two. "fixed": `weights`.
        sizes: Number of examples of each domain. Length: domains.
        temperature: Read by "temperature" alone; 1 is proportional, infinity balanced. The paper takes 10.
        weights: Read by "fixed" alone: shares on any scale; 0 leaves a domain out. Length: domains.
    """
    counts = np.asarray(sizes, dtype=np.float64)
    if counts.ndim != 1 or not len(counts) or not (counts >= 1).all():
        raise ValueError(f"Every domain needs at least one example, but sizes are {sizes}. Leave out the empty ones.")
    if kind == "fixed":
        shares = np.asarray([] if weights is None else weights, dtype=np.float64)
        if shares.shape != counts.shape or not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
            raise ValueError(
                f"A fixed mix needs one finite weight per domain, none negative and not all 0, but weights are "
                f"{weights} for {len(counts)} domains. Give weights such as {[1.0] * len(counts)}."
            )
        return shares / shares.sum()
    temperatures = {"balanced": math.inf, "proportional": 1.0, "temperature": temperature}
    if kind not in temperatures:
        raise ValueError(f"Unknown mix {kind!r}. Choose one of {sorted([*temperatures, 'fixed'])}.")
    if not temperature > 0:
        raise ValueError(f"The temperature of a mix must be above 0, but is {temperature}. 1 is proportional.")
    return _softmax(np.log(counts) / temperatures[kind], counts > 0)


def effective_epochs(draws: Sequence[float], sizes: Sequence[int]) -> ndarray:
    """How often each domain has been seen whole: examples drawn from it over examples it has. Shape (domains,)."""
    return np.asarray(draws, dtype=np.float64) / np.asarray(sizes, dtype=np.float64)


def importance_weights(mix: ndarray, objective: ndarray | None = None) -> ndarray:
    """Factor on the loss of each domain, u_i / p_i, that keeps the objective u while the mix p decides where to look.

    A gate learns how frequent domains are, so without this a learned mix also changes what is being learned.

    Args:
        mix: The mix in force. Shape (domains,).
        objective: Share of each domain in the objective, the same for all by default. Shape (domains,).

    Returns:
        Factors whose mean over draws from the mix is 1; 0 for masked domains, which are never drawn. Shape (domains,).
    """
    objective = np.ones_like(mix) if objective is None else objective
    seen = mix > 0
    objective = np.where(seen, objective, 0)
    return np.where(seen, objective / objective.sum() / np.where(seen, mix, 1), 0)


def similarity(z: ndarray, target: int | None = None) -> ndarray:
    """Reward: how much each domain resembles all domains, the mean of its cosines with itself included (Eq. 8).

    Frozen specialists have the same hidden states for ever, so that in stage one this reward hardly moves.

    Args:
        z: Mean hidden state of each domain (Eq. 7). Shape (domains, hidden).
        target: Index of a domain to specialise in (the paper's MoSpec): the cosine to that domain alone, 1 for itself.

    Returns:
        Between -1 and 1. Shape (domains,).
    """
    cosines = _cosines(z, z)
    return cosines.mean(1) if target is None else cosines[:, target]


def difficulty(nll: ndarray, nll_start: ndarray, *, geometric: bool = False) -> float:
    """Reward of one domain: perplexity now over perplexity at the start, averaged over examples (Eq. 9 and 10).

    1 at the start, less as the domain is learnt, more where it is forgotten. What cannot be learnt, such as noise,
    stays at 1 and is therefore drawn more and more: bound it with `guarded`.

    Args:
        nll: Mean negative log-likelihood of each example, nats per trained token. Leave out examples without trained
            tokens. Shape (examples,).
        nll_start: The same examples under the model as it was before training. Shape (examples,).
        geometric: Takes the geometric mean, which a few extreme examples cannot rule.
    """
    change = np.asarray(nll, dtype=np.float64) - np.asarray(nll_start, dtype=np.float64)
    return float(np.exp(change.mean()) if geometric else np.exp(change).mean())


def regret(nll_fused: ndarray, nll_own: ndarray) -> float:
    """Reward of one domain: perplexity of the fused model over that of the domain's own specialist, averaged.

    `difficulty` (Eq. 10) with the specialist in place of the start: 1 where fusing costs the domain nothing.

    Args:
        nll_fused: Mean negative log-likelihood of each example, nats per trained token. Shape (examples,).
        nll_own: The same examples under the specialist. Shape (examples,).
    """
    return difficulty(nll_fused, nll_own)


def gradient_cosine(dev: ndarray, train: ndarray) -> ndarray:
    """Reward: how well a step on each domain serves all domains (MultiDDS-S; Wang et al., 2020, arXiv 2004.06748).

    Args:
        dev: Gradient on held-out examples of each domain. Shape (domains, parameters).
        train: Gradient on training examples of each domain. Shape (domains, parameters).

    Returns:
        Mean cosine of a domain's training gradient to every held-out gradient, from -1 to 1. Shape (domains,).
    """
    return _cosines(train, dev).mean(1)


def uncertainty(measure: str, top: ndarray, entropy: ndarray, trained: ndarray) -> float:
    """Reward of one domain: how unsure the model is of held-out examples.

    From MultiUAT (Wu et al., 2021, arXiv 2109.02284), which averages 30 passes with dropout; language models mostly
    have none, so this is one pass. Its two measures made of variances are left out.

    Args:
        measure: "PreTP": 1 - the product over tokens of the highest probability; "ExpTP": 1 - their mean; "EnSent":
            mean entropy of the tokens; "EnEOS": entropy of the last one. Each is averaged over examples.
        top: Highest next-token probability. Shape (examples, seq).
        entropy: Entropy of the next-token probabilities, nats. Shape (examples, seq).
        trained: Whether a token counts. Each example needs one. Shape (examples, seq), bool.
    """
    lengths = trained.sum(1)
    if measure == "PreTP":
        values = 1 - np.where(trained, top, 1).prod(1)
    elif measure == "ExpTP":
        values = 1 - np.where(trained, top, 0).sum(1) / lengths
    elif measure == "EnSent":
        values = np.where(trained, entropy, 0).sum(1) / lengths
    elif measure == "EnEOS":
        last = trained.shape[1] - 1 - trained[:, ::-1].argmax(1)
        values = entropy[np.arange(len(entropy)), last]
    else:
        raise ValueError(f"Unknown measure {measure!r}. Choose one of ['EnEOS', 'EnSent', 'ExpTP', 'PreTP'].")
    return float(values.mean())


def towards_target(rewards: ndarray, target: int) -> ndarray:
    """Doubles the reward of the domain to specialise in (MoSpec for `difficulty` and `regret`). Shape (domains,)."""
    return np.where(np.arange(len(rewards)) == target, 2 * rewards, rewards)


def usable_rewards(rewards: ndarray, mix: ndarray, domains: Sequence[str]) -> ndarray | None:
    """Rewards that a policy can take: none below 0 and, for masked domains, which nobody measures, 0.

    A negative reward has no fixed point: it would push the domain's share towards 0 without end.

    Args:
        rewards: As measured. Shape (domains,).
        mix: The mix in force. Shape (domains,).
        domains: Names of the domains, for the warning.

    Returns:
        Rewards, shape (domains,), or None if one is NaN or infinite: keep the mix and do not update anything.
    """
    rewards = np.where(mix > 0, np.asarray(rewards, dtype=np.float64), 0)
    broken = {domains[i]: float(rewards[i]) for i in np.flatnonzero(~np.isfinite(rewards))}
    if broken:
        warnings.warn(f"The mix stays as it is, because a reward is not finite: {broken}.", stacklevel=2)
        return None
    return rewards.clip(min=0)


def guarded(
    mix: ndarray, *, floor: float = 0.0, epochs: ndarray | None = None, max_epochs: float = math.inf
) -> ndarray:
    """A mix within bounds: every domain has at least its floor, and none is repeated without end.

    With n domains that are not masked, p becomes (1 - e) p + e / n with e = n * floor. A domain that has been seen
    `max_epochs` times leaves for good, and the others share its part. It is looked at when the mix changes, so it can
    be overshot by what is drawn between two changes. If every domain has reached it, the cap is lifted with a warning
    rather than end a long run: a run of at most max_epochs * sum(sizes) draws never comes to that.

    Args:
        mix: What a policy returned. Shape (domains,).
        floor: Smallest share of any domain that is not masked, at most 1 / domains.
        epochs: How often each domain has been seen whole, see `effective_epochs`. Shape (domains,).
        max_epochs: How often a domain may be seen whole.
    """
    seen = mix > 0
    if not 0 <= floor * seen.sum() <= 1:
        raise ValueError(
            f"A floor is a share of the mix that every domain gets, but {seen.sum()} domains times floor={floor} is "
            f"not between 0 and 1. Take at most {1 / seen.sum():.3g}."
        )
    if epochs is not None:
        below = seen & (np.asarray(epochs) < max_epochs)
        if below.any():
            seen = below
        else:
            warnings.warn(
                f"Every domain has been seen {max_epochs} times, so the cap is lifted. Train fewer steps or raise it.",
                stacklevel=2,
            )
    shares = np.where(seen, mix, 0) / mix[seen].sum()
    return np.where(seen, (1 - seen.sum() * floor) * shares + floor, 0)


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
            self._descend(self._gradient(_softmax(self._scores(), seen) * rewards.sum() - rewards))
        return _softmax(self._scores(), seen)

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
            self.shares = (1 - self.rate) * self.shares + self.rate * np.where(seen, rewards, 0) / total
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
        return (1 - domains * now) * _softmax(before * self.gains, seen) + now * seen


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
        return _softmax((rewards + bonus) / self.temperature, mix > 0)


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
        return _softmax(self.prior + self.eta * self.graph @ self.losses.sum(0), mix > 0)


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
        return _softmax(self.prior + self.eta * self.gains, seen)


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


def _softmax(scores: ndarray, seen: ndarray) -> ndarray:
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max())
    # a share that rounds to 0 would mask its domain for good
    shares = np.where(seen, shares.clip(min=1e-300), 0)
    return shares / shares.sum()


def _log_prior(prior: ndarray) -> ndarray:
    # masked domains get a finite score, which JSON can hold; `_softmax` masks them
    return np.log(np.where(prior > 0, prior, 1))


def _cosines(a: ndarray, b: ndarray) -> ndarray:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
