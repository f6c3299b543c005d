"""What vLLM's backend can do beside serving, tried on fused models: the same tokens, or refused in words.

    python tests/vllm/features.py [--venv FOLDER] [--write]

Speculation from n-grams and from a specialist, LoRA at run time, int8 weights, tensor and pipeline parallel in two
processes. Prefix caching and prompts in parts are in `check_vllm.py`. Exits with 1 if anything differs.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # this script's own folder would hide the vllm package

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.utils import logging  # noqa: E402

from modeling_ultrafuser import UltraFuserForCausalLM  # noqa: E402
from tests.support.tiny import tokenizer  # noqa: E402
from tests.vllm.cases import (  # noqa: E402
    CHAT_TEMPLATE,
    SERVED,
    greedy,
    prompts_and_answers,
    save_fused,
)
from tests.vllm.check_vllm import (  # noqa: E402
    PACKAGES,
    WIDTH,
    ask,
    compare,
    environment,
    job,
    versions_of,
)


DRAFTS = 3
NGRAMS = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SMALL = {"max_num_seqs": 4, "block_size": 32}
TWO = {"distributed_executor_backend": "mp", **SMALL}
PLAIN = "three depths, one tied"
LOOKING_BACK = "an evidence gate that calibrates"
WINDOWS = "Llama and Mistral with a window"
CHOICES = {PLAIN: {}, LOOKING_BACK: {"gate": "evidence:128+calibration"}, WINDOWS: {}}
# with int8 sums are exact, and what is rounded to them is not to the last bit: a share of equal tokens
LEAST_INT8 = 0.8
PIPELINE = "Could not find `ModuleList`"
HEAD_IN_PARTS = "takes the whole head in plain weights"


def main() -> None:
    """Runs everything and prints a table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="made if it is not there")
    parser.add_argument("--write", action="store_true", help="write results/vllm_features.json")
    parser.add_argument("--only", help="run groups whose name holds this: one, two")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    python = environment(arguments.venv.absolute())
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, group in {"one": in_one_process, "two": in_two_processes}.items():
            if arguments.only in (None, name):
                for row in group(Path(work), python):
                    rows.append(row)
                    print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['case']:{WIDTH}} {row['detail']}", flush=True)
    if arguments.write:
        machine = {"kind": "cpu", "architecture": platform.machine(), "cores": os.cpu_count()}
        versions = {
            "built with": versions_of(sys.executable, PACKAGES[:2]),
            "served with": versions_of(python, PACKAGES),
        }
        results = {"machine": machine, "versions": versions, "checks": rows}
        (ROOT / "results" / "vllm_features.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(not all(row["passed"] for row in rows))


def in_one_process(work: Path, python: str) -> Iterator[dict]:
    """Speculates, adapts, rounds."""
    folders = {name: work / f"fused_{i}" for i, name in enumerate(CHOICES)}
    for name, folder in folders.items():
        save_fused(folder, SERVED[name], CHOICES[name])
    wanted = {name: prompts_and_answers(folder, "float32") for name, folder in folders.items()}
    drafter = {"method": "draft_model", "model": str(save_specialist(folders[PLAIN], work / "drafter"))}
    drafter["num_speculative_tokens"] = DRAFTS
    adapter, adapted = save_adapter(folders[PLAIN], work / "adapter", wanted[PLAIN]["prompts"])
    rounded, in_fake_int8 = save_int8(folders[PLAIN], work / "int8", wanted[PLAIN]["prompts"])
    cases = {
        f"{PLAIN}, n-grams draft": (PLAIN, {"speculative_config": NGRAMS}),
        # some prompts have one beginning, and start in one step
        f"{LOOKING_BACK}, n-grams draft": (
            LOOKING_BACK,
            {"speculative_config": NGRAMS, "enable_prefix_caching": True},
        ),
        f"{WINDOWS}, n-grams draft": (WINDOWS, {"speculative_config": NGRAMS}),
        f"{PLAIN}, a specialist drafts": (PLAIN, {"speculative_config": drafter}),
    }
    jobs = [job(folders[n], prompts=wanted[n]["prompts"], options=SMALL | o) for n, o in cases.values()]
    lora = {"enable_lora": True, "max_lora_rank": 8, **SMALL}
    jobs.append(job(folders[PLAIN], prompts=adapted["prompts"], options=lora) | {"adapter": str(adapter)})
    jobs.append(job(rounded, prompts=wanted[PLAIN]["prompts"], options=SMALL))
    *speculated, with_adapter, in_int8 = alone(work, python, jobs)
    for (case, (name, _)), found in zip(cases.items(), speculated, strict=True):
        row = compare(case, "float32", wanted[name], found)
        row["accepted"] = found.get("accepted", 0)
        row["detail"] += f", {row['accepted']} drafted tokens accepted"
        # of random text with a window no draft is right
        yield row | {"passed": row["passed"] and (row["accepted"] > 0 or name == WINDOWS)}
    yield compare("LoRA at run time, on one specialist", "float32", adapted, with_adapter)
    yield int8_row(in_fake_int8, in_int8)


def in_two_processes(work: Path, python: str) -> Iterator[dict]:
    """Cuts every layer in two, or the layers into two parts."""
    folders = {name: work / f"cut_{i}" for i, name in enumerate(CHOICES)}
    for name, folder in folders.items():
        save_fused(folder, SERVED[name], CHOICES[name])
    wanted = prompts_and_answers(folders[PLAIN], "float32")
    # a core for each
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    cut = {"tensor_parallel_size": 2, **TWO}
    jobs = [
        job(folders[PLAIN], prompts=wanted["prompts"], options=cut),
        job(folders[LOOKING_BACK], options=cut),
        job(folders[PLAIN], options={"pipeline_parallel_size": 2, **TWO}),
    ]
    whole, looking_back, in_a_row = alone(work, python, jobs)
    yield compare(f"{PLAIN}, tensor parallel in two processes", "float32", wanted, whole)
    yield refused(f"{LOOKING_BACK}, tensor parallel", looking_back, HEAD_IN_PARTS)
    yield refused(f"{PLAIN}, pipeline parallel", in_a_row, PIPELINE)


def alone(work: Path, python: str, jobs: list[dict]) -> list[dict]:
    """Does each job in a process of its own: after an engine that speculates no other starts in the same one."""
    found = []
    for one in jobs:
        try:
            (answer,) = ask(work, python, [one])
        except RuntimeError as error:
            answer = {"refusal": str(error)}
        if "refusal" in answer:
            answer["refusal"] += "\n" + (work / "inside.log").read_text()
        found.append(answer)
    return found


def refused(case: str, found: dict, sentence: str) -> dict:
    """One row: the engine must have stopped, and told why, if only in what its processes print."""
    lines = found.get("refusal", "was served").splitlines()
    told = next((line for line in lines if sentence in line), None)
    detail = lines[-1] if told is None else told.partition(": ")[2] or told
    return {"case": f"refused: {case}", "passed": told is not None, "detail": detail[-400:]}


def save_specialist(folder: Path, target: Path) -> Path:
    """Takes the first specialist out, as `ultrafuser specialist` does."""
    model = UltraFuserForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.specialist(model.config.specialist_names[0]).save_pretrained(target)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(target)
    return target


def save_adapter(folder: Path, target: Path, prompts: list[list[int]]) -> tuple[Path, dict]:
    """Saves an adapter on the second specialist, and returns what transformers and PEFT answer with it."""
    torch.manual_seed(1)
    model = UltraFuserForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = model.config.specialist_names[1]
    layers = rf".*specialists\.{name}\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM"))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(target)
    answers, log_probs = zip(*(greedy(adapted.eval(), p) for p in prompts), strict=True)
    plain = [greedy(UltraFuserForCausalLM.from_pretrained(folder).eval(), p)[0] for p in prompts[:2]]
    if plain == list(answers[:2]):
        raise ValueError("The adapter must change what is answered, or nothing is compared.")
    return target, {"prompts": prompts, "answers": list(answers), "log_probs": list(log_probs), "window": None}


class Rounded(torch.nn.Module):
    """A linear layer as W8A8 has it, in float32: weights rounded by row, inputs by token."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight, self.bias = (linear.weight.detach() / scale).round() * scale, linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scale = states.abs().amax(-1, keepdim=True) / 127
        return torch.nn.functional.linear((states / scale).round() * scale, self.weight, self.bias)


def save_int8(folder: Path, target: Path, prompts: list[list[int]]) -> tuple[Path, dict]:
    """Saves a folder whose specialists' linear layers are in int8, in the format "compressed-tensors" (W8A8).

    The gate, whose weights are no linear layers, and the head stay. Returns what the same model answers in transformers.
    """
    model = UltraFuserForCausalLM.from_pretrained(folder)
    linear = {n for n, m in model.model.specialists.named_modules() if isinstance(m, torch.nn.Linear)}
    model.save_pretrained(target)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(target)
    state = load_file(target / "model.safetensors")
    for name in linear:
        key = f"model.specialists.{name}.weight"
        scale = state[key].abs().amax(1, keepdim=True) / 127
        state[key], state[f"{key}_scale"] = (state[key] / scale).round().to(torch.int8), scale
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    settings = json.loads((target / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(settings))
    for name in linear:
        model.model.specialists.set_submodule(name, Rounded(model.model.specialists.get_submodule(name)))
    answers, log_probs = zip(*(greedy(model.eval(), p) for p in prompts), strict=True)
    return target, {"prompts": prompts, "answers": list(answers), "log_probs": list(log_probs), "window": None}


def int8_row(wanted: dict, found: dict) -> dict:
    """One row: nearly all tokens are those of the model with rounded weights and inputs."""
    row = compare("int8 weights and activations", "float32", wanted, found)
    share = row.get("equal_tokens", 0) / row.get("tokens", 1)
    return row | {"passed": share >= LEAST_INT8}


if __name__ == "__main__":
    main()
