"""Runs fused models in mlx-lm, on a CPU, and compares its tokens with transformers'.

    python tests/mlx/check_mlx.py [--venv FOLDER] [--write]

Makes a virtual environment for mlx-lm if it is not there, builds tiny fused models in the environment that it was called
from, and lets mlx-lm continue prompts through the model file of `examples/mlx_ultrafuser.py`. Exits with 1 if anything differs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # this script's own folder would hide the mlx package

import torch  # noqa: E402
from transformers import set_seed  # noqa: E402
from transformers.utils import logging  # noqa: E402

from modeling_ultrafuser import UltraFuserForCausalLM  # noqa: E402
from tests.support.tiny import VOCAB, specialist, tokenizer  # noqa: E402
from tests.vllm.cases import stir_by_width  # noqa: E402
from tests.vllm.check_vllm import furthest, tokens_row, versions_of  # noqa: E402


REQUIREMENTS = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
NEW_TOKENS, TOLERANCE = 24, 1e-3
DEPTHS = [("llama", {}), ("llama", {"layers": 3, "tied": True}), ("llama", {"layers": 1})]
SIZES = [("qwen2", {}), ("qwen3", {"layers": 3, "hidden_size": 48}), ("mistral", {"sliding_window": None})]
CASES = {
    "three depths, the default gate": (DEPTHS, {"gate": "cross:16+calibration"}),
    "families and hidden sizes, the paper's gate": (SIZES, {"gate": "mlp:16"}),
    "one hidden size, the paper's gate": (DEPTHS, {"gate": "mlp:16"}),
    "a linear gate": (SIZES, {"gate": "linear+calibration"}),
}
REFUSED = {
    "a gate that looks back": (DEPTHS, {"gate": "posterior"}, "whose gate is one of"),
    "a mixture of probabilities": (DEPTHS, {"fusion": "probabilities"}, "whose fusion is one of ['logits']"),
    "a window": ([DEPTHS[0], ("mistral", {"sliding_window": 4})], {}, "whose layer type is one of"),
}


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-mlx", help="made if it is not there")
    parser.add_argument("--write", action="store_true", help="write results/mlx.json")
    arguments = parser.parse_args()
    python = environment(arguments.venv.absolute())
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        rows = list(check(Path(work), python))
    for row in rows:
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['case']:46} {row['detail']}")
    if arguments.write:
        machine = {"kind": "cpu", "architecture": platform.machine(), "cores": os.cpu_count()}
        versions = {
            "built with": versions_of(sys.executable, ("torch", "transformers")),
            "run with": versions_of(python, ("mlx", "mlx-lm")),
        }
        results = {"machine": machine, "versions": versions, "checks": rows}
        (ROOT / "results" / "mlx.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(not all(row["passed"] for row in rows))


def environment(folder: Path) -> str:
    """The Python of mlx-lm's own virtual environment, which is made if it is not there."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return python


def check(work: Path, python: str) -> Iterator[dict]:
    """Builds, runs and compares. Yields one row per model."""
    jobs, wanted = [], []
    for number, (parts, choices, *_) in enumerate((*CASES.values(), *REFUSED.values())):
        folder = work / str(number)
        model = fused(parts, choices)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        prompts = [[(start + 5 * i) % (VOCAB - 3) + 3 for i in range(n)] for start, n in ((0, 30), (7, 5), (40, 1))]
        file = str(ROOT / "examples" / "mlx_ultrafuser.py")
        jobs.append({"folder": str(folder), "file": file, "prompts": prompts, "new_tokens": NEW_TOKENS})
        answers, log_probs = zip(*(greedy(model, prompt) for prompt in prompts), strict=True)
        words = tokenizer().encode("2 + 2", add_special_tokens=False)
        wanted.append({"answers": list(answers), "log_probs": list(log_probs), "words": words})
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = [
        python,
        "-P",
        str(Path(__file__).with_name("inside.py")),
        str(work / "jobs.json"),
        str(work / "answers"),
    ]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=work, env=variables)
    found = json.loads((work / "answers").read_text())
    for name, right in zip(CASES, wanted, strict=False):
        yield compare(name, right, found.pop(0))
    for name, (_, _, sentence) in REFUSED.items():
        told = found.pop(0).get("refusal", "was read")
        detail = " ".join(told.split("ValueError: ")[-1].split())
        yield {"case": f"refused: {name}", "passed": sentence in told, "detail": detail}


def fused(parts: list, choices: dict) -> UltraFuserForCausalLM:
    """A fused model whose gate has opinions."""
    set_seed(0)
    models = {name: specialist(family, **fields) for name, (family, fields) in zip("abc", parts)}  # noqa: B905
    model = UltraFuserForCausalLM.from_specialists(models, **choices).eval()
    stir_by_width(model)
    return model


@torch.no_grad()
def greedy(model: UltraFuserForCausalLM, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest next tokens as transformers has them, and their log-probabilities."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, **options)
    tokens = output.sequences[0, len(prompt) :]
    log_probs = torch.cat(output.logits).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), log_probs.tolist()


def compare(case: str, wanted: dict, found: dict) -> dict:
    """One row: the same tokens and log-probabilities, and the same tokenizer."""
    if "refusal" in found:
        return {"case": case, "passed": False, "detail": found["refusal"]}
    row = tokens_row(case, wanted["answers"], found["tokens"])
    row["furthest_log_prob"] = furthest(wanted, found)
    row["detail"] += f", log-probabilities up to {row['furthest_log_prob']:.0e} apart"
    same = wanted["words"] == found["words"] and row["furthest_log_prob"] <= TOLERANCE
    return row | {"passed": row["passed"] and same}


if __name__ == "__main__":
    main()
