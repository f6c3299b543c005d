"""Arithmetic on mixes: softmax, bounds, importance weights.

A *mix* is a float64 vector of shape (domains,) that sums to 1. A domain whose share is 0 is masked, and stays masked.
"""

import math
import warnings

import numpy as np
from numpy import ndarray


def importance_weights(mix: ndarray) -> ndarray:
    """Returns factors on the losses of the domains, with which all domains count alike under any mix.

    A gate learns how frequent domains are, so without them a learned mix also changes what is learned.

    Args:
        mix: The mix in force. Shape (domains,).

    Returns:
        Factors whose mean over draws from the mix is 1; 0 for masked domains, which are never drawn. Shape (domains,).
    """
    seen = mix > 0
    return np.where(seen, seen / seen.sum() / np.where(seen, mix, 1), 0)


def guarded(
    mix: ndarray, *, floor: float = 0.0, epochs: ndarray | None = None, max_epochs: float = math.inf
) -> ndarray:
    """Returns a mix within bounds: every domain has at least its floor, and none is repeated without end.

    With n domains that are not masked, p becomes (1 - e) p + e / n with e = n * floor. A domain that has been seen
    `max_epochs` times leaves for good, and the others share its part. It is looked at when the mix changes, so it can
    be overshot by what is drawn between two changes. If every domain has reached it, the cap is lifted with a warning
    rather than end a long run: a run of at most max_epochs * sum(sizes) draws never comes to that.

    Args:
        mix: What a policy returned. Shape (domains,).
        floor: Smallest share of any domain that is not masked, at most 1 / domains.
        epochs: How often each domain has been seen whole. Shape (domains,).
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
    """Returns shares in proportion to exp(score), 0 for masked domains. Shape (domains,)."""
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max())
    # a share that rounds to 0 would mask its domain for good
    shares = np.where(seen, shares.clip(min=1e-300), 0)
    return shares / shares.sum()
