"""How to train a fused model, tried out on the quickstart's corpora: which stages, and which mix of domains.

    python -m experiments.training stages     # the paper's ablation: results/stages/
    python -m experiments.training mixes      # learned mixes against fixed ones: results/mixes/
    python -m experiments.training rates      # learning rates: results/rates/

Each run is one JSON file; those that are there are not run again. When all are, a table is printed and written beside
them, for the mixes with a figure of each mix over time. Specialists are trained once per seed, in the folder `--work`.
The corpora are made unequal on purpose (`SHARES`): with equal ones no mix could differ from the balanced one.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from ultrafuser.corpora import DOMAINS, documents, splits
from ultrafuser.quickstart import LENGTH, Schedule, make_specialist, measure, to_blocks, train_tokenizer, versions


ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
SHARES = {"text": 1.0, "code": 0.5, "math": 0.15}  # of the examples to fuse with
STEPS = Schedule(specialist_steps=200, gate_steps=60, gate_rate=2e-2, joint_steps=30, joint_rate=1e-3)

STAGES = {
    # gate steps, joint steps, mix; a gate step costs less than half of a joint step
    "joint from the start": (0, 60, "proportional"),
    "two stages": (60, 30, "proportional"),
    "two stages, balanced": (60, 30, "balanced"),
}

# Ten times the authors' learning rate: their runs have 48 updates of the mix, these six.
MOS = {"mix_policy": "logits", "mix_policy_settings": {"learning_rate": 1e-3}}
MIXES = {
    "balanced": {},
    "proportional": {"mix": "proportional"},
    "temperature 10": {"mix": "temperature"},
    **{f"MoS {r}": {"mix_reward": r, "mix_smoothing": 1.0, **MOS} for r in ("similarity", "difficulty", "regret")},
    **{f"MoS {r} + EMA": {"mix_reward": r, **MOS} for r in ("similarity", "difficulty", "regret")},
    "MoSpec math": {"mix_reward": "difficulty", "mix_target": "math", **MOS},
    "MultiDDS": {"mix_reward": "gradient", **MOS},
    "MultiUAT": {"mix_reward": "uncertainty", **MOS},
    "Aioli": {"mix_reward": "loss", "mix_policy": "aioli", "mix_smoothing": 1.0},
    "EXP3": {"mix_reward": "loss", "mix_policy": "exp3"},
    "UCB": {"mix_reward": "loss", "mix_policy": "ucb"},
}
LEARNED = {"mix_every": 5, "mix_delay": 1, "mix_probe": 8}

RATES = {
    f"{stage} {rate:g}": (stage, rate)
    for stage, rates in (("gate", (2e-5, 1e-3, 1e-2, 3e-2)), ("joint", (2e-5, 3e-4, 1e-3, 3e-3)))
    for rate in rates
}


def main() -> None:
    """Runs what is missing of an experiment, then writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ultrafuser-experiments")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    options = parser.parse_args()
    names, run = EXPERIMENTS[options.experiment]
    folder = ROOT / "results" / options.experiment
    folder.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[:1] if options.experiment == "rates" else SEEDS
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        list(pool.map(prepare, seeds, [options.work] * len(seeds)))
        todo = [(n, s, file_of(folder, n, s)) for s in seeds for n in names if not file_of(folder, n, s).exists()]
        waiting = [(name, seed, pool.submit(run, name, seed, options.work, path)) for name, seed, path in todo]
        for i, (name, seed, future) in enumerate(waiting, 1):
            print(f"{i}/{len(waiting)} {name}, seed {seed}: {future.result()}", flush=True)
    summary = summarise(folder, names, seeds)
    (folder / "table.md").write_text(summary + "\n")
    print(summary)
    if options.experiment == "mixes":
        draw_mixes(folder, names)


def file_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"


def prepare(seed: int, work: Path) -> None:
    """Tokenizer, specialists, data and a gate after stage one, unless they are there."""
    folder = work / f"{seed}"
    if (folder / "gate.pt").exists():
        return
    torch.set_num_threads(1)
    parts = {d: splits(documents(d, seed)) for d in DOMAINS}
    tokenizer = train_tokenizer([text for part in parts.values() for text in part["specialist"]])
    blocks = {d: {name: to_blocks(texts, tokenizer) for name, texts in parts[d].items()} for d in DOMAINS}
    for d in DOMAINS:
        make_specialist(blocks[d]["specialist"], tokenizer, folder / d, STEPS, seed)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.save(blocks, folder / "blocks.pt")
    model, data, held_out = load(seed, work)
    gate_stage(model, data, work, seed)
    torch.save((model.model.fusion_gate.state_dict(), measure(model, held_out)), folder / "gate.pt")


def load(seed: int, work: Path) -> tuple[UltraFuserForCausalLM, dict, dict]:
    """A fused model with a new gate, data to train it and held-out blocks."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = work / f"{seed}"
    set_seed(seed)
    model = UltraFuserForCausalLM.from_specialists({d: folder / d for d in DOMAINS})
    blocks = torch.load(folder / "blocks.pt")
    kept = {d: blocks[d]["fuse"][: round(SHARES[d] * len(blocks[d]["fuse"]))].tolist() for d in DOMAINS}
    data = {d: Dataset.from_dict({"input_ids": ids, "labels": ids}) for d, ids in kept.items()}
    return model, data, {d: blocks[d]["held_out"] for d in DOMAINS}


def after_stage_one(seed: int, work: Path) -> tuple[UltraFuserForCausalLM, dict, dict, dict[str, float]]:
    """As `load`, with the gate of stage one, and what was measured then."""
    model, data, held_out = load(seed, work)
    gate, losses = torch.load(work / f"{seed}" / "gate.pt")
    model.model.fusion_gate.load_state_dict(gate)
    return model, data, held_out, losses


def settings(work: Path, seed: int, **more) -> dict:
    """Arguments of every stage here."""
    shared = {"per_device_train_batch_size": 12, "examples_per_domain": 4, "max_length": LENGTH, "bf16": False}
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True}
    off = {"gradient_checkpointing": False, "disable_tqdm": True, "seed": seed}
    return {"output_dir": str(work / "stage"), **shared, **quiet, **off, **more}


def gate_stage(model, data, work: Path, seed: int, **more) -> None:
    arguments = GateStageConfig(
        **settings(work, seed, **{"max_steps": STEPS.gate_steps, "learning_rate": STEPS.gate_rate, **more})
    )
    GateTrainer(model, arguments, data, processing_class=tokenizer_of(work, seed)).train()


def joint_stage(model, data, work: Path, seed: int, **more) -> JointTrainer:
    arguments = JointStageConfig(
        **settings(work, seed, **{"max_steps": STEPS.joint_steps, "learning_rate": STEPS.joint_rate, **more})
    )
    trainer = JointTrainer(model, arguments, data, processing_class=tokenizer_of(work, seed))
    trainer.train()
    return trainer


def tokenizer_of(work: Path, seed: int):
    return AutoTokenizer.from_pretrained(work / f"{seed}" / "tokenizer")


def run_stages(name: str, seed: int, work: Path, path: Path) -> dict[str, float]:
    """One variant of the paper's ablation (Ding et al., 2024, section 4.4)."""
    gate_steps, joint_steps, mix = STAGES[name]
    model, data, held_out = load(seed, work)
    before = measure(model, held_out)
    began = time.process_time()
    if gate_steps:
        gate_stage(model, data, work, seed, max_steps=gate_steps, mix=mix)
    joint_stage(model, data, work, seed, max_steps=joint_steps, mix=mix)
    return write(path, name, seed, model, held_out, seconds=time.process_time() - began, uniform=before)


def run_mixes(name: str, seed: int, work: Path, path: Path) -> dict[str, float]:
    """Stage two under one mix, from the same stage one."""
    model, data, held_out, before = after_stage_one(seed, work)
    chosen = MIXES[name]
    began = time.process_time()
    trainer = joint_stage(model, data, work, seed, **(LEARNED if "mix_reward" in chosen else {}), **chosen)
    seconds = time.process_time() - began
    mixes = [(0, trainer.prior.tolist())] if trainer.controller is None else trainer.controller.mixes
    drawn = trainer.sampler.counts(STEPS.joint_steps).tolist()
    more = {"mixes": mixes, "domains": trainer.domains, "drawn": drawn, "stage_one": before}
    return write(path, name, seed, model, held_out, seconds=seconds, **more)


def run_rates(name: str, seed: int, work: Path, path: Path) -> dict[str, float]:
    """One learning rate in one stage."""
    stage, rate = RATES[name]
    model, data, held_out, _ = after_stage_one(seed, work)
    parameters = model.specialist("text").num_parameters()
    began = time.process_time()
    if stage == "gate":
        model, data, held_out = load(seed, work)
        gate_stage(model, data, work, seed, learning_rate=rate)
    else:
        joint_stage(model, data, work, seed, learning_rate=rate)
    return write(path, name, seed, model, held_out, seconds=time.process_time() - began, parameters=parameters)


def write(path: Path, name: str, seed: int, model, held_out, **more) -> dict[str, float]:
    """Measures and writes one result. `seconds` are of processor time, which other jobs do not change much."""
    losses = measure(model, held_out)
    found = {"name": name, "seed": seed, "nats_per_token": losses, "versions": versions(), "machine": "cpu", **more}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return {d: round(loss, 3) for d, loss in losses.items()}


def summarise(folder: Path, names, seeds) -> str:
    """Held-out nats per token, mean ± standard deviation over seeds, as Markdown."""
    found = {n: [json.loads(file_of(folder, n, s).read_text()) for s in seeds] for n in names}
    reference = next(iter(found.values()))
    base = statistics.mean(r["seconds"] for r in reference)
    compares = "stage_one" in reference[0]
    columns = ["", *DOMAINS, "mean", *(["worst to stage one"] if compares else []), "time"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, runs in found.items():
        losses = [r["nats_per_token"] for r in runs]
        cells = [spread([x[d] for x in losses]) for d in DOMAINS]
        cells.append(spread([statistics.mean(x.values()) for x in losses]))
        if compares:
            cells.append(spread([max(r["nats_per_token"][d] - r["stage_one"][d] for d in DOMAINS) for r in runs]))
        cells.append(f"{statistics.mean(r['seconds'] for r in runs) / base:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{more}"


def draw_mixes(folder: Path, names) -> None:
    """Each mix over time, seed 0."""
    from matplotlib import pyplot as plt

    learned = [n for n in names if "mix_reward" in MIXES[n]]
    figure, axes = plt.subplots(4, 3, figsize=(10, 9), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, learned, strict=True):
        found = json.loads(file_of(folder, name, 0).read_text())
        # the last mix was to begin when the run was over
        mixes = [(s, m) for s, m in found["mixes"] if s < STEPS.joint_steps]
        steps = [s for s, _ in mixes] + [STEPS.joint_steps]
        for d, domain in enumerate(found["domains"]):
            shares = [m[d] for _, m in mixes]
            axis.step(steps, [*shares, shares[-1]], where="post", label=domain)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(0, 1)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("optimizer step of stage two")
    figure.supylabel("share of the mix")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"mixes.{suffix}", dpi=120)


EXPERIMENTS = {"stages": (STAGES, run_stages), "mixes": (MIXES, run_mixes), "rates": (RATES, run_rates)}

if __name__ == "__main__":
    main()
