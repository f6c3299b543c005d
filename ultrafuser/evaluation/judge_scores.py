"""Scores from a judge's verdicts, with how sure they are. Only questions are resampled: turns of one belong together."""

from statistics import fmean, stdev

import numpy as np
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression

from .questions import Question


def pairwise_scores(questions: list[Question], verdicts: dict, ours: dict, theirs: dict) -> dict:
    """Computes how often the judge prefers our answers, as in AlpacaEval, but in both orders.

    A question counts by the mean of both orders: 1 if ours is preferred, 0 if the other, a half for a tie.

    Args:
        questions: That were put.
        verdicts: "1", "2", "tie" or None by question and order; in order 0 our answer was shown first.
        ours: Our answers by question.
        theirs: The answers compared with, by question.

    Returns:
        `win_rate` with `standard_error` and a 95 % bootstrap `interval`, `by_category`, numbers of questions `won`,
        `tied`, `lost` and `unjudged` (in one order or both); `consistent`, the share in which both orders agree;
        `first_preferred`, how often the answer shown first won, a half without favour; `mean_length` of the answers in
        characters, and `length_controlled_win_rate`. A value that cannot be known is None.
    """
    value = {"1": (1.0, 0.0), "2": (0.0, 1.0), "tie": (0.5, 0.5)}
    judged = [q for q in questions if all(verdicts.get((q.id, order)) for order in (0, 1))]
    orders = [[value[verdicts[q.id, order]][order] for order in (0, 1)] for q in judged]
    preferences = [fmean(pair) for pair in orders]
    lengths = {
        name: [sum(map(len, answers[q.id])) for q in judged] for name, answers in (("ours", ours), ("theirs", theirs))
    }
    differences = np.subtract(lengths["ours"], lengths["theirs"])
    return {
        "win_rate": _mean(preferences),
        **_spread([[p] for p in preferences]),
        "by_category": _by_category(judged, [[p] for p in preferences]),
        "won": sum(p > 0.5 for p in preferences),
        "tied": sum(p == 0.5 for p in preferences),
        "lost": sum(p < 0.5 for p in preferences),
        "unjudged": len(questions) - len(judged),
        "consistent": _mean([float(a == b) for a, b in orders]),
        "first_preferred": _mean([v for a, b in orders for v in (a, 1 - b)]),
        "mean_length": {name: _mean(values) for name, values in lengths.items()},
        "length_controlled_win_rate": length_controlled(np.array(preferences), differences),
    }


def length_controlled(preferences: np.ndarray, differences: np.ndarray) -> float | None:
    """The win rate to expect if both answers were equally long (after Dubois et al., 2024, arXiv 2404.04475).

    A logistic regression of the preference on tanh of the standardised difference in length, read at no difference.
    The paper's third term, each instruction's difficulty, is fitted over many models and left out here, so the number
    does not compare with AlpacaEval's own.

    Args:
        preferences: Between 0 and 1. Shape (questions,).
        differences: Of length, ours less theirs. Shape (questions,).

    Returns:
        None if all preferences are 0, or all are 1: no curve fits them.
    """
    if not len(preferences) or preferences.min() == preferences.max() in (0, 1):
        return None
    spread = differences.std() or 1.0
    features = np.tanh(differences / spread)[:, None].repeat(2, 0)
    # a preference of 0.5 is half a win and half a loss
    outcomes = np.tile([1, 0], len(preferences))
    weights = np.stack([preferences, 1 - preferences], -1).ravel()
    fitted = LogisticRegression().fit(features, outcomes, sample_weight=weights)
    return float(fitted.predict_proba([[0.0]])[0, 1])


def grading_scores(questions: list[Question], verdicts: dict) -> dict:
    """Mean grade over all judged turns, as in MT-Bench.

    Args:
        questions: That were put.
        verdicts: "1" to "10", or None, by question and turn.

    Returns:
        `score` with `standard_error` and a 95 % bootstrap `interval`, `by_category`, `by_turn`, and the numbers of
        turns `judged` and `unjudged`. A value that cannot be known is None.
    """
    grades = {key: int(v) for key, v in verdicts.items() if v is not None}
    rows = [[grades[q.id, t] for t in range(len(q.turns)) if (q.id, t) in grades] for q in questions]
    turns = max(len(q.turns) for q in questions)
    return {
        "score": _mean([g for row in rows for g in row]),
        **_spread([row for row in rows if row]),
        "by_category": _by_category(questions, rows),
        "by_turn": {str(t + 1): _mean([g for (_, turn), g in grades.items() if turn == t]) for t in range(turns)},
        "judged": len(grades),
        "unjudged": sum(len(q.turns) for q in questions) - len(grades),
    }


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _spread(rows: list[list[float]]) -> dict:
    """Standard error of the mean over questions, and a bootstrap interval of the mean over all values."""
    if len(rows) < 2:
        return {"standard_error": None, "interval": None}
    sums, counts = np.array([[sum(row), len(row)] for row in rows], float).T
    found = bootstrap(
        (sums, counts), lambda s, n, axis: s.sum(axis) / n.sum(axis), paired=True, method="percentile", rng=0
    )
    return {
        "standard_error": stdev(map(fmean, rows)) / len(rows) ** 0.5,
        "interval": [float(end) for end in found.confidence_interval],
    }


def _by_category(questions: list[Question], rows: list[list[float]]) -> dict[str, float | None]:
    categories = dict.fromkeys(q.category for q in questions)
    return {
        c: _mean([v for q, row in zip(questions, rows, strict=True) if q.category == c for v in row])
        for c in categories
    }
