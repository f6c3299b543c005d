"""Results as the evaluation and the judging write them."""

NAMES = ["text", "code", "math"]


def row(name, kind, losses, difference, interval):
    mean = sum(losses) / 3
    by_domain = dict(zip(NAMES, losses, strict=True))
    return {
        "name": name,
        "kind": kind,
        "loss": {**by_domain, "mixed": 9.0},
        "mean": mean,
        "mean_interval": [mean - 0.1, mean + 0.1],
        "difference": difference,
        "difference_interval": interval,
        "p": 0.01,
        "accuracy": dict.fromkeys(NAMES, 0.5),
        "calibration_error": dict.fromkeys(NAMES, 0.02),
    }


COMPARISON = {
    "domains": [*NAMES, "mixed"],
    "specialists": NAMES,
    "seed": 0,
    "versions": {"torch": "2.0"},
    "commit": "abc1234",
    "rows": [
        row("fused", "fused", [3.0, 2.0, 1.0], 0.0, [0.0, 0.0]),
        row("lucky router", "router", [2.99, 1.99, 0.99], -0.01, [-0.03, 0.01]),
        row("one model", "trained", [2.0, 1.0, 0.0], -1.0, [-1.1, -0.9]),
        row("math specialist", "specialist", [9.0, 9.0, 0.0], 4.0, [3.9, 4.1]),
    ],
    "gate": {
        "mean_weights": {"text": {"text": 0.7, "code": 0.2, "math": 0.1}},
        "entropy": {"text": 0.8},
    },
}


JUDGEMENT = {
    "method": "pairwise",
    "questions": "tatsu-lab/alpaca_eval@" + "a" * 40,
    "judge": "a-judge",
    "win_rate": 0.625,
    "interval": [0.5, 0.75],
    "unjudged": 2,
}
