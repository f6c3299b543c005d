"""Measures full models that were compressed into LoRA specialists of their base: `python -m benchmarks.compression`.

Three models are tuned from one base, all weights, on text, code and mathematics of the quickstart, and compressed at
several ranks. Measured are the share of the gain of tuning that is kept on held-out text of the own domain,
(base - compressed) / (base - full) in nats per token, and the bytes of weights of three compressed specialists fused,
against three full models fused, and against the three models as they are, embedding and head of a tied one counted once.

Without `--base` the models are those of `experiments/baselines`, of 0.9 million parameters; with it, the base is a folder,
such as SmolLM2-135M-Instruct. Each writes its own part of `results/compression.json`. Models are made once in `--work`.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from experiments.baseline_runs import folder_of, specialists_of
from modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.compress.compressing import BASE, SHARED, Compression
from ultrafuser.compress.factors import Limits
from ultrafuser.compress.gain import losses
from ultrafuser.evaluation.measurement import HeldOut, held_out
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS, documents, splits
from ultrafuser.quickstart.toy_models import pretrain, to_blocks


RESULTS = Path(__file__).parent.parent / "results" / "compression.json"
TOY = {"base": {"steps": 100, "rate": 0.003}, "specialist": {"steps": 80, "rate": 0.003}}
# of full fine-tunes of a real base: optimizer steps of 8 texts of 64 tokens
STEPS, RATE, LENGTH, CHARACTERS = 30, 1e-4, 64, 150_000
PROMPT = 32


def main() -> None:
    """Makes the models, compresses and measures them, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="Folder of a base to tune. Default: the base of the toy.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--shared", nargs="+", choices=SHARED, default=["base"])
    parser.add_argument("--examples", type=int, default=24, help="Held-out examples of each domain, of 256 tokens.")
    parser.add_argument("--work", type=Path, default=Path("runs/compression"), help="Folder for models.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, held = toy(options.work) if options.base is None else tuned(options.base, options.work / options.base.name)
    base, held = options.base or folder / BASE, {d: data[: options.examples] for d, data in held.items()}
    rows = [measure(base, folder, held, rank, shared) for shared in options.shared for rank in options.ranks]
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    name = "toy" if options.base is None else options.base.name
    numbers = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    result[name] = {"provenance": provenance(), "parameters": numbers, "rows": rows}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def toy(work: Path) -> tuple[Path, dict[str, HeldOut]]:
    """Makes the toy's base and specialists. Returns their folder, and held-out examples by domain."""
    folder, lock = folder_of(0, work, **TOY)
    with lock:
        blocks, tokenizer, _ = specialists_of(0, folder, **TOY)
    return folder, {d: _held_out(blocks[d]["held_out"], tokenizer) for d in DOMAINS}


def tuned(base: Path, folder: Path) -> tuple[Path, dict[str, HeldOut]]:
    """Tunes a base on each domain, unless that was done. Returns as `toy`."""
    tokenizer, held = AutoTokenizer.from_pretrained(base), {}
    for domain in DOMAINS:
        parts = splits(documents(domain, 0, CHARACTERS))
        blocks = {name: to_blocks(texts, tokenizer) for name, texts in parts.items()}
        held[domain] = _held_out(blocks["held_out"], tokenizer)
        if not (folder / domain / "model.safetensors").exists():
            _tune(base, folder / domain, blocks["specialist"].view(-1, LENGTH), tokenizer)
    return folder, held


def _tune(base: Path, folder: Path, blocks: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    pretrain(model, blocks[order], folder, STEPS, RATE, 0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _held_out(blocks: Tensor, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    rows = [{"input_ids": row} for row in blocks.tolist()]
    return held_out(rows, tokenizer, prompt_tokens=PROMPT)


def measure(base: Path, folder: Path, held: dict[str, HeldOut], rank: int, shared: str) -> dict:
    """Compresses at a rank, and measures what is kept and what it takes."""
    compression = Compression([f"{d}={folder / d}" for d in DOMAINS], str(base), Limits(rank), shared)
    out = folder / f"compressed-{rank}-{shared}"
    reports = compression.run(out)
    found = losses(compression, out, held)
    small, large = (weight_bytes({d: where / d for d in DOMAINS}) for where in (out, folder))
    alone = sum(file.stat().st_size for d in DOMAINS for file in (folder / d).glob("*.safetensors"))
    row = {
        "rank": rank,
        "shared": shared,
        "kept": {d: of["kept"] for d, of in found.items()},
        "losses": found,
        "error": {d: report["error"] for d, report in reports.items()},
        "memory against three fused": small / large,
        "memory against three models": small / alone,
    }
    print(json.dumps(row), flush=True)
    return row


def weight_bytes(specialists: dict[str, Path]) -> int:
    """Bytes of the weights of a fused model, with a gate that has none."""
    fused = UltraFuserForCausalLM.from_specialists(specialists, gate="uniform")
    return sum(p.numel() * p.element_size() for p in fused.parameters())


if __name__ == "__main__":
    main()
