"""Rows of a comparison for reports, and text that is hard to show."""

NAMES = ["text", "code", "math"]


TEXT = "def f(x):\n    return 2\n"


HARD = "naïve 日本語 🙂\n\t“é” <script>alert(1)</script> & \ufffd end"


def rows(names=("fused", "text specialist", "code specialist", "math specialist", "costs $5 & <b>")):
    """Rows of a comparison with intervals for every other one only."""
    kinds = {"fused": "fused", **{f"{name} specialist": "specialist" for name in NAMES}}
    found = []
    for place, name in enumerate(names):
        loss = {domain: 1.0 + place + d / 10 for d, domain in enumerate(NAMES)}
        row = {"name": name, "kind": kinds.get(name, "merge"), "loss": loss, "mean": 1.1 + place}
        row["difference"] = float(place)
        if place % 2:
            row["loss_interval"] = {domain: [value - 0.1, value + 0.2] for domain, value in loss.items()}
            row |= {"mean_interval": [place + 1.0, place + 1.2], "difference_interval": [place - 0.1, place + 0.1]}
        found.append(row)
    return found
