"""Tables of the paper beside ours (Ding et al., 2024, arXiv 2403.08281)."""

from pathlib import Path
from statistics import mean

from experiments import ledger
from experiments.averages import DOMAINS, averaged, losses_of, numbers, vector, weights_of
from ultrafuser.reports.marked_tables import markdown


# Ding et al., 2024, table 2: TruthfulQA, HumanEval and GSM8K, in per cent
PAPER_STAGES = {
    "joint from the start": (51.17, 46.95, 53.83),
    "two stages": (61.72, 50.00, 52.69),
    "two stages, balanced": (64.67, 53.05, 54.59),
}
# table 3 (ACL 2025 version): loss on AlpacaEval, HumanEval and GSM8K, in a unit that it does not name
PAPER_LOSSES = {
    "text specialist": (0.046, 0.055, 0.063),
    "code specialist": (0.060, 0.042, 0.056),
    "math specialist": (0.062, 0.064, 0.036),
}
# table 6: mean weight of the specialists for text, code and mathematics, by domain
PAPER_WEIGHTS = {"text": (0.45, 0.29, 0.26), "code": (0.23, 0.59, 0.18), "math": (0.18, 0.39, 0.43)}
# table 1: average of seven benchmarks in per cent, recomputed from the seven; tuned on what the fused model is tuned on
PAPER_TUNED = {
    "text specialist": (35.46,),
    "text specialist, tuned further": (41.60,),
    "code specialist": (36.78,),
    "code specialist, tuned further": (21.76,),
    "math specialist": (29.90,),
    "math specialist, tuned further": (36.94,),
    "fused": (46.05,),
}


def stages_beside_paper(path: Path) -> str:
    """The paper's table 2 beside ours: what each step of the training adds."""
    found = ledger.results(path.name)
    ours = {name: averaged(vector(r["nats_per_token"]) for r in results) for name, results in found.items()}
    return beside(["TruthfulQA, %", "HumanEval, %", "GSM8K, %"], PAPER_STAGES, 2, DOMAINS, ours, 3)


def losses_beside_paper(path: Path) -> str:
    """The paper's table 3 beside ours: loss of every specialist on every domain."""
    return beside(["AlpacaEval", "HumanEval", "GSM8K"], PAPER_LOSSES, 3, DOMAINS, losses_of(path), 3)


def weights_beside_paper(path: Path) -> str:
    """The paper's table 6 beside ours: mean gate weights by domain."""
    heads = [[f"{d}, {whose}" for d in DOMAINS] for whose in ("paper", "ours")]
    return beside(heads[0], PAPER_WEIGHTS, 2, heads[1], weights_of(path), 2, corner="mean gate weight on")


def tuned_beside_paper(path: Path) -> str:
    """The paper's figure 5 (of its first version) beside ours: every specialist tuned on all the data."""
    ours = {name: [mean(by_domain)] for name, by_domain in losses_of(path).items()}
    return beside(["seven benchmarks, %"], PAPER_TUNED, 2, ["mean of domains, nats"], ours, 3)


def beside(heads, paper, places, our_heads, ours, our_places, corner="") -> str:
    """The paper's rows, each with ours of the same name."""
    rows = [[name, *numbers(p, places), *numbers(ours[name], our_places)] for name, p in paper.items()]
    return markdown([corner, *heads, *our_heads], rows)
