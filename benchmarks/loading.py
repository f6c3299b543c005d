"""Time and memory of loading a fused model, against its specialists loaded one by one: `python -m benchmarks.loading`.

Random Llamas of 270 million parameters in bfloat16 are written to a temporary folder, and fused. Every load is in a
process of its own, forked from one that has imported the libraries and loaded nothing; all ways take turns, with the
files in the page cache. Time is that of a process's processors, divided by that of the separate loads of the same round;
wall-clock time stands beside it. Memory is anonymous, that is, not backed by the files: how much more there was after
loading, and after a pass over a few tokens, as a share of the weights; and the peak of all memory, mapped files too. Two
kinds of specialists: with a head of their own, and with one tied to their embeddings, which the wide head of the fused
model has to hold again. Writes `results/loading.json`.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging

from benchmarks.timing import held
from modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.provenance import provenance


ROOT = Path(__file__).parent.parent
NAMES = ["text", "code", "math"]
IDS = torch.arange(3, 11)[None]
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}


def main() -> None:
    """Measures every way for both kinds of specialists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "loading.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    sizes = {"hidden_size": options.hidden, "num_hidden_layers": options.layers, "vocab_size": options.vocab}
    sizes["intermediate_size"] = 11 * options.hidden // 4
    rows = []
    for tied in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), tied, **sizes)
            make(Path(folder, "tiny"), tied, **TINY)
            rows += compare_loading(Path(folder), tied, options.rounds)
    shape = {"specialists": len(NAMES), **sizes, "dtype": "bfloat16", "rounds": options.rounds}
    options.out.write_text(json.dumps({**provenance(), "shape": shape, "rows": rows}, indent=2) + "\n")


def make(folder: Path, tied: bool, **sizes: int) -> None:
    """Writes specialists and the model that they make, and checks that it speaks as they do."""
    config = LlamaConfig(**sizes, num_attention_heads=16, tie_word_embeddings=tied, dtype="bfloat16")
    for name in NAMES:
        set_seed(NAMES.index(name))
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    fused = from_specialists(folder)
    for name, specialist in zip(NAMES, separately(folder), strict=True):
        with torch.inference_mode():
            if not torch.equal(specialist(IDS).logits, fused.specialist(name)(IDS).logits):
                raise AssertionError(f"Inside the fused model {name!r} says something else than by itself.")
    fused.save_pretrained(folder / "fused")


def compare_loading(folder: Path, tied: bool, rounds: int) -> list[dict]:
    """One row per way."""
    runs = {way: [] for way in WAYS}
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["benchmarks.loading"])
    with clean.Pool(1, maxtasksperchild=1) as pool:
        # the first round brings the files into the page cache and is not counted
        for number in range(rounds + 1):
            for way, own in runs.items():
                found = pool.apply(measure_loading, (way, folder))
                if number:
                    own.append(found)
    return [row(way, tied, own, runs["separately"]) for way, own in runs.items()]


def row(way: str, tied: bool, runs: list[dict], separate: list[dict]) -> dict:
    """A way's medians, and its times against the separate loads of the same rounds."""
    found = {"way": way, "tied": tied, "weights_bytes": runs[0]["weights"]}
    for clock in ("cpu", "wall"):
        ratios = [own[clock] / other[clock] for own, other in zip(runs, separate, strict=True)]
        found[f"{clock}_ratio"] = round(statistics.median(ratios), 3)
        found[f"{clock}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        found[f"{clock}_seconds"] = [round(own[clock], 3) for own in runs]
    for memory in ("private", "private_after_a_pass", "peak"):
        found[memory] = round(statistics.median(own[memory] / own["weights"] for own in runs), 4)
    print(
        f"{'tied, ' * tied}{way}: {found['cpu_ratio']} of the time {found['cpu_ratio_range']}, private memory "
        f"{found['private']:.2%} of the weights, {found['private_after_a_pass']:.2%} after a pass, peak {found['peak']}",
        flush=True,
    )
    return found


@torch.inference_mode()
def measure_loading(way: str, folder: Path) -> dict[str, float]:
    """Seconds of one load, and bytes that the process holds more than before."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    load = WAYS[way]
    # what libraries import and allocate when they are first used is not counted
    run(load(folder / "tiny"))
    before, peak_before = held("Anonymous", "smaps_rollup"), held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wall, cpu = time.perf_counter(), time.process_time()
    models = load(folder)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found["private"] = held("Anonymous", "smaps_rollup") - before
    found["peak"] = held("VmHWM") - peak_before
    run(models)
    found["private_after_a_pass"] = held("Anonymous", "smaps_rollup") - before
    found["weights"] = sum(p.numel() * p.element_size() for m in listed(models) for p in m.parameters())
    return found


def run(models) -> None:
    """A pass over a few tokens, so that every weight is read."""
    for model in listed(models):
        model(IDS, use_cache=False)


def listed(models) -> list:
    """One model or several, as a list."""
    return models if isinstance(models, list) else [models]


def separately(folder: Path) -> list[LlamaForCausalLM]:
    """Every specialist by itself, as one would without fusing."""
    return [AutoModelForCausalLM.from_pretrained(folder / name) for name in NAMES]


def fused_folder(folder: Path) -> UltraFuserForCausalLM:
    """A saved fused model."""
    return UltraFuserForCausalLM.from_pretrained(folder / "fused")


def from_specialists(folder: Path) -> UltraFuserForCausalLM:
    """The specialists, checked and fused now."""
    return UltraFuserForCausalLM.from_specialists({name: folder / name for name in NAMES})


WAYS = {"separately": separately, "fused folder": fused_folder, "fused now": from_specialists}


if __name__ == "__main__":
    main()
