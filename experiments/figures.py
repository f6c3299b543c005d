"""Draws the documents' figures from the files under results/.

python -m experiments.figures
"""

from experiments import ledger, real_figures
from ultrafuser.reports.charts import draw_mixes
from ultrafuser.reports.colours import assign
from ultrafuser.reports.plots import save


def main() -> None:
    """Every learned mix over time, seed 0, and what contenders of the study at a real size solve, if it was run."""
    runs = [run for run in ledger.read("mixes") if run.seed == 0 and "mix_reward" in run.settings["joint"]]
    found = {run.variant: ledger.results("mixes")[run.variant][0] for run in runs}
    domains = next(iter(found.values()))["domains"]
    steps = runs[0].settings["joint"]["max_steps"]
    mixes = {name: result["mixes"] for name, result in found.items()}
    save(ledger.ROOT / "results" / "mixes" / "mixes", draw_mixes, mixes, domains, steps, assign(domains))
    if list((real := ledger.ROOT / "results" / "real").glob("*.json")):
        real_figures.write(real)


if __name__ == "__main__":
    main()
