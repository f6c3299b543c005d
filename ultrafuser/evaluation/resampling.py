"""Measures how sure a difference is, by resampling whole examples, because tokens of one example are not independent.

Domains count alike, however many tokens each has.
"""

import numpy as np
import torch

from .measurement import HeldOut, Scores


def per_example(scores: Scores, data: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss in nats and number of scored tokens of each example."""
    return (scores.losses * data.scored).sum(-1).double().numpy(), data.scored.sum(-1).double().numpy()


def interval(domains: list[tuple[np.ndarray, np.ndarray]], *, samples: int = 2000, level: float = 0.95, seed: int = 0):
    """Bootstrap percentile interval of the mean over domains of nats per token.

    Args:
        domains: For each domain what `per_example` gives: sums of what is averaged, and numbers of tokens.
        samples: Resamples.
        level: Share of the resamples inside the interval.
        seed: Same seed, same interval.

    Returns:
        The two ends.
    """
    means = 0
    for number, (sums, counts) in enumerate(domains):
        # with replacement
        drawn = np.random.default_rng(seed + number).integers(len(sums), size=(samples, len(sums)))
        means = means + sums[drawn].sum(-1) / counts[drawn].sum(-1) / len(domains)
    tail = (1 - level) / 2
    return [float(q) for q in np.quantile(means, [tail, 1 - tail])]


def permutation_test(domains: list[tuple[np.ndarray, np.ndarray]], *, samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided paired permutation test, by sign flips, of two models that read the same examples.

    If neither were better, each example's difference would have had either sign with the same chance.

    Args:
        domains: For each domain the differences of the examples' summed losses, and numbers of tokens.
        samples: Random sign flips.
        seed: Same seed, same p.

    Returns:
        The share of flips, the real one included, whose mean over domains is as far from 0 as the real one.
    """
    rng = np.random.default_rng(seed)
    real, flipped = 0.0, np.zeros(samples)
    for sums, counts in domains:
        real += sums.sum() / counts.sum()
        flipped += rng.choice([-1.0, 1.0], size=(samples, len(sums))) @ sums / counts.sum()
    return float((1 + (np.abs(flipped) >= abs(real) - 1e-12).sum()) / (1 + samples))


def flips(scores: Scores, reference: Scores, data: HeldOut) -> dict[str, float]:
    """Counts flips of likeliest tokens against the specialist whose domain it is (MUSCLE, arXiv 2407.09435).

    Returns:
        Shares of all scored tokens: `positive_flips`, wrong there and right here, and `negative_flips`, right there and
        wrong here; and `retention`, the share of what was right there that is right here too.
    """
    here, there = scores.correct[data.scored], reference.correct[data.scored]
    shares = {"positive_flips": here & ~there, "negative_flips": ~here & there}
    kept = here[there].float().mean().item() if there.any() else 1.0
    return {name: share.float().mean().item() for name, share in shares.items()} | {"retention": kept}


def calibration_error(scores: Scores, data: HeldOut, bins: int = 15) -> float:
    """Expected calibration error with equal bins (Guo et al., 2017): the mean gap between confidence and accuracy.

    Args:
        scores: The guesses, their probabilities, and whether they were right.
        data: What was guessed.
        bins: Of confidence, between 0 and 1.
    """
    confidence, correct = scores.confidence[data.scored], scores.correct[data.scored]
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence.double() - correct.double())
    return (gaps.abs().sum() / len(confidence)).item()
