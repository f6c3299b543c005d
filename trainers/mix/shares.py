"""Which domain how often: fixed mixes, and what keeps a learned one within bounds.

A *mix* is a float64 vector of shape (domains,) that sums to 1; a domain whose share is 0 is masked, and stays so. To
learn one, `rewards` says what is measured, `policies` how the mix follows, and the guards here what it may become.

Balanced data is hard to beat: the paper on learned mixes (Wu et al., 2024, https://arxiv.org/abs/2406.08811) reports
single runs, and later ones find learned mixes no better than fixed ones in about half their cases.
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
    return softmax(np.log(counts) / temperatures[kind], counts > 0)


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


def softmax(scores: ndarray, seen: ndarray) -> ndarray:
    """Shares in proportion to exp(score), 0 for masked domains. Shape (domains,)."""
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max())
    # a share that rounds to 0 would mask its domain for good
    shares = np.where(seen, shares.clip(min=1e-300), 0)
    return shares / shares.sum()
