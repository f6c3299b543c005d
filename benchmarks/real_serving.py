"""Prefill and decoding at a real size: `python -m benchmarks.real_serving QUICKSTART/fused --venv VENV`.

QUICKSTART is the folder of `ultrafuser quickstart --real`: the base of 135 million parameters and two adapters of it. The
same three specialists are measured as adapters of one base and as whole models, plain, stacked and self-drafting, beside
one specialist and a dense model of about three times its size, in transformers and, where VENV is vLLM's environment, in
vLLM (see `benchmarks.serving`). All ways of one model must give the same greedy tokens first. Ways take turns: each number
is the ratio to one specialist in transformers in the same round, by the clock. Writes `results/real_serving.json`.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.gpu import dense
from benchmarks.serving import Prompts, Serve, in_transformers, in_vllm, vllm_python
from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gates_ultrafuser import gate_word
from ultrafuser.atomic import write_json
from ultrafuser.decoding.drafting import self_draft
from ultrafuser.decoding.stacking import stack
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.real_data import HELD_OUT_ROWS, by_domain
from ultrafuser.serve.chat import prompt_ids


ROOT = Path(__file__).parent.parent
BATCHES, NEW, PREFILL, THREADS = (1, 8, 16), 32, 256, 2


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fused", type=Path, help="folder of the fused model that `ultrafuser quickstart --real` made")
    parser.add_argument("--venv", type=Path, default=os.environ.get("VLLM_VENV"), help="vLLM's; default: without vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "real_serving.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    python = options.venv and vllm_python(options.venv)
    measure(options.fused, python, options.rounds, options.out)


def measure(folder: Path, python: str | None, rounds: int, out: Path) -> dict:
    """Measures prefill and decoding at every batch. Each is written as soon as it is there."""
    models, asked = models_of(UltraFuserForCausalLM.from_pretrained(folder).eval()), prompts(folder)
    settings = {"rounds": rounds, "threads": THREADS, "new_tokens": NEW, "prefill_tokens": PREFILL}
    result = {
        "provenance": provenance(),
        **settings,
        "parameters": {name: parameters(model) for name, model in models.items()},
    }
    result |= {"prefill": {}, "decoding": {}}
    with ExitStack() as running:
        ways = decoding_ways(models)
        if python:
            work = Path(running.enter_context(tempfile.TemporaryDirectory()))
            ways |= vllm_ways(models, python, work, running)
        for batch in BATCHES:
            text = torch.tensor([(sum(asked, []) * PREFILL)[:PREFILL]] * batch)
            reads = {f"{name}, transformers": partial(prefill, model, text) for name, model in models.items()}
            result["prefill"][str(batch)] = compared(reads, rounds)
            result["decoding"][str(batch)] = compared(same_tokens(ways, asked[:batch]), rounds)
            for what in ("prefill", "decoding"):
                print(f"\n{what}, batch {batch}")
                for name, found in result[what][str(batch)].items():
                    print(f"  {name}: {found}", flush=True)
            write_json(out, result)
    return result


def models_of(adapted: UltraFuserForCausalLM) -> dict[str, PreTrainedModel]:
    """Makes what is compared: adapters of one base as whole models with the same gate, one specialist, a dense model."""
    config = adapted.config
    alone = {name: adapted.specialist(name) for name in config.specialist_names}
    gate = gate_word(config)
    whole = UltraFuserForCausalLM.from_specialists(alone, gate=gate, fusion=config.fusion, dtype="float32")
    whole.model.fusion_gate.load_state_dict(adapted.model.fusion_gate.state_dict())
    one = next(iter(alone.values()))
    models = {"one specialist": one, "fused, adapters": adapted, "fused": whole.eval(), "fused, stacked": stack(whole)}
    models["dense, three times the size"] = dense(one).eval()
    for model in models.values():
        # all say as much
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return models


def parameters(model: PreTrainedModel) -> int:
    """Counts parameters, shared ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def prompts(folder: Path) -> Prompts:
    """Reads prompts of the held-out conversations, of all domains in turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = [row for group in zip(*by_domain(HELD_OUT_ROWS).values(), strict=True) for row in group]
    return [prompt_ids(tokenizer, row["prompt"])[0].tolist() for row in rows[: max(BATCHES)]]


def decoding_ways(models: dict[str, PreTrainedModel]) -> dict[str, Serve]:
    """Lists ways to decode in transformers."""
    ways = {f"{name}, transformers": in_transformers(model) for name, model in models.items()}
    # adapters of one base are rows of one batch, and none of them can draft alone
    ways["fused, self-drafting, transformers"] = in_transformers(models["fused"], custom_generate=self_draft)
    return ways


def vllm_ways(models: dict[str, PreTrainedModel], python: str, work: Path, running: ExitStack) -> dict[str, Serve]:
    """Starts an engine for each model that vLLM serves."""
    ways = {}
    for name in ("one specialist", "fused", "dense, three times the size"):
        models[name].save_pretrained(work / name)
        ways[f"{name}, vLLM"] = running.enter_context(in_vllm(python, work / name, max(BATCHES)))
    return ways


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """Measures the seconds of reading prompts into a cache."""
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return {"seconds": time.perf_counter() - start}


def same_tokens(ways: dict[str, Serve], asked: Prompts) -> dict[str, Callable[[], dict[str, float]]]:
    """Makes measurements of the seconds per step of ways that agree on their tokens.

    Raises:
        RuntimeError: If two ways of one model do not.
    """
    said: dict[str, tuple] = {}
    for name, serve in ways.items():
        tokens, subject = serve(asked, NEW)[0], name.split(",")[0]
        first, expected = said.setdefault(subject, (name, tokens))
        if tokens != expected:
            raise RuntimeError(f"{name} continues prompts otherwise than {first}.")
    return {name: lambda serve=serve: {"seconds": serve(asked, NEW)[1] / NEW} for name, serve in ways.items()}


def compared(ways: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Compares ways with the first, each run once before."""
    for run in ways.values():
        run()
    return {name: found["seconds"] for name, found in compare_ways(ways, rounds).items()}


def table(result: dict, what: str) -> str:
    """Writes Markdown: each way's time against one specialist in transformers, by batch, with millions of parameters."""
    batches = result[what]
    lines = [
        f"| | parameters | {' | '.join(f'batch {batch}' for batch in batches)} |",
        "|---" + "|---:" * (1 + len(batches)) + "|",
    ]
    for way in next(iter(batches.values())):
        # self-drafting is the fused model's own
        size = result["parameters"].get(way.rpartition(", ")[0], result["parameters"]["fused"])
        cells = ["{median:.2f} ({least:.2f} to {most:.2f})".format(**batches[batch][way]) for batch in batches]
        lines.append(f"| {' | '.join([way, f'{size / 1e6:.0f}M', *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
