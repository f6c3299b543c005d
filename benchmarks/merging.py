"""Measures merges, and stock mixtures of experts, of the toy's specialists: `python -m benchmarks.merging`.

Three models are tuned from one base on text, code and mathematics of the quickstart, merged with coefficients that are given
or searched for, and exported as Mixtral, at once and after 100 steps that train its routers. Coefficients and routers are made
of text to fuse with; losses are on held-out text, in nats per token behind the first 32.
Beside them stand the base, the specialist of each domain, and two fused models that need no training either.

Models are made once in `--work`; results of all seeds are in `results/merging.json`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.compression import PROMPT, TOY
from experiments.baseline_runs import folder_of, specialists_of
from modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.evaluation.measurement import HeldOut, held_out, mean_loss
from ultrafuser.export.moe_folder import export
from ultrafuser.merge import merge_method
from ultrafuser.merge.merged_folder import merge_folders
from ultrafuser.merge.searches import search
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS
from ultrafuser.quickstart.toy_models import pretrain


RESULTS = Path(__file__).parent.parent / "results" / "merging.json"
THIRD = str(1 / len(DOMAINS))
# settings of `merge_folders` by row; `search` by its name, and whom to merge if not all
MERGED = {
    "merge: average": {},
    "merge: task arithmetic, LiNeS 1/3 to 5/6": {"method": "task_arithmetic", "lines": f"{THIRD},0.5"},
    "merge: task arithmetic, searched by MAP": {"method": "task_arithmetic", "search": "map"},
    "merge: ties, searched by MAP": {"method": "ties:0.2", "search": "map"},
    "merge: dare, searched by MAP": {"method": "dare", "search": "map"},
    "merge: breadcrumbs, searched by MAP": {"method": "breadcrumbs", "search": "map"},
    "merge: parameter competition, searched by MAP": {"method": "pcb", "search": "map"},
    "merge: model stock": {"method": "model_stock"},
    "merge: regmean": {"method": "regmean"},
    "merge: layer swap, math between text": {"method": "layer_swap", "specialists": ["math", "text"]},
}
STEPS, RATE = 100, 3e-3  # of the routers


def main() -> None:
    """Makes the models, merges, exports and measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--examples", type=int, default=24, help="Held-out examples of each domain, of 256 tokens.")
    parser.add_argument("--work", type=Path, default=Path("runs/merging"), help="Folder for models.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seeds = []
    for seed in options.seeds:
        folder, lock = folder_of(seed, options.work, **TOY)
        with lock:
            blocks, _, _ = specialists_of(seed, folder, **TOY)
            seeds.append({"seed": seed, "losses": measure(folder, blocks, options.examples, seed)})
    options.out.write_text(json.dumps({**provenance(), "rows": seeds}, indent=2) + "\n")


def measure(folder: Path, blocks: dict[str, dict[str, Tensor]], examples: int, seed: int) -> dict[str, dict]:
    """Returns held-out losses by row and domain.

    Args:
        folder: Folder with a base and a specialist of each domain.
        blocks: By domain, token ids to fuse with (`fuse`) and `held_out`. Shapes (blocks, length).
        examples: Most held-out blocks of each domain.
        seed: Of what is random.
    """
    held = {d: _held(blocks[d]["held_out"][:examples]) for d in DOMAINS}
    data, base = _written(folder, blocks, examples), str(folder / "base")
    pairs, found = [f"{d}={folder / d}" for d in DOMAINS], {}

    def note(row: str, model: PreTrainedModel) -> None:
        found[row] = {d: mean_loss(model, x) for d, x in held.items()}
        print(json.dumps({row: found[row]}), flush=True)

    note("base", _loaded(folder / "base"))
    found["specialist of each domain"] = {d: mean_loss(_loaded(folder / d), held[d]) for d in DOMAINS}
    places = {d: str(folder / d) for d in DOMAINS}
    for row, choices in (
        ("uniform", {"gate": "uniform"}),
        ("posterior", {"gate": "posterior", "fusion": "probabilities"}),
    ):
        note(f"fused, {row}", UltraFuserForCausalLM.from_specialists(places, **choices).eval())
    for row, settings in MERGED.items():
        note(row, _loaded(_merged(folder / "merged", pairs, base, data, dict(settings), seed)))
    for row, choices in (("average", {}), ("donor text", {"donor": "text"})):
        out = folder / "experts"
        shutil.rmtree(out, ignore_errors=True)
        export(pairs, "mixtral", out, data, **choices)
        model = _loaded(out)
        note(f"experts, {row}", model)
        note(f"experts, {row}, routers trained", _trained(model, blocks, folder, seed))
    return found


def _held(blocks: Tensor) -> HeldOut:
    return held_out([{"input_ids": row} for row in blocks.tolist()], None, prompt_tokens=PROMPT)


def _written(folder: Path, blocks: dict[str, dict[str, Tensor]], examples: int) -> dict[str, str]:
    """Writes rows to merge with. Returns their files by domain."""
    files = {d: folder / f"merging-{d}.jsonl" for d in DOMAINS}
    for d, file in files.items():
        rows = blocks[d]["fuse"][:examples].tolist()
        file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return {d: str(file) for d, file in files.items()}


def _merged(out: Path, pairs: list[str], base: str, data: dict[str, str], settings: dict, seed: int) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    how, names = settings.pop("search", None), settings.pop("specialists", DOMAINS)
    if how:
        settings |= {"search": lambda merge, held, work: search(merge, how, held, work)}
    reads = how or merge_method(settings.get("method", "average")).reads_inputs
    pairs = [pair for name in names for pair in pairs if pair.startswith(f"{name}=")]
    merge_folders(pairs, out, base=base, data=data if reads else None, seed=seed, **settings)
    return out


def _loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _trained(model: PreTrainedModel, blocks: dict[str, dict[str, Tensor]], folder: Path, seed: int) -> PreTrainedModel:
    """Trains the routers alone, on blocks of all domains in a random order."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("mlp.gate.weight")
    rows = torch.cat([blocks[d]["fuse"] for d in DOMAINS])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    set_seed(seed)
    pretrain(model, rows[order], folder / "routers", STEPS, RATE, seed)
    return model.eval()


if __name__ == "__main__":
    main()
