"""Draws the documents' figures from the files under results/.

python -m experiments.figures
"""

from experiments import ledger


def draw_mixes() -> None:
    """Every learned mix over time, seed 0."""
    from matplotlib import pyplot as plt

    # fixed ids and no date: the same results are the same file
    plt.rcParams["svg.hashsalt"] = "mixes"
    runs = [run for run in ledger.read("mixes") if run.seed == 0 and "mix_reward" in run.settings["joint"]]
    figure, axes = plt.subplots(4, 3, figsize=(10, 9), sharex=True, sharey=True, layout="constrained")
    for axis, run in zip(axes.flat, runs, strict=True):
        found, end = ledger.results("mixes")[run.variant][0], run.settings["joint"]["max_steps"]
        # the last mix was to begin when the run was over
        mixes = [(step, mix) for step, mix in found["mixes"] if step < end]
        for d, domain in enumerate(found["domains"]):
            shares = [mix[d] for _, mix in mixes]
            axis.step([*(step for step, _ in mixes), end], [*shares, shares[-1]], where="post", label=domain)
        axis.set_title(run.variant, fontsize=10)
        axis.set_ylim(0, 1)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("optimizer step of stage two")
    figure.supylabel("share of the mix")
    folder = ledger.ROOT / "results" / "mixes"
    figure.savefig(folder / "mixes.png", dpi=120)
    figure.savefig(folder / "mixes.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw_mixes()
