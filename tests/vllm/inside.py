"""What vLLM says, in a process that cannot import our packages: `python -P inside.py JOBS ANSWERS`.

Run by `check_vllm.py` with the Python of vLLM's own environment. The engine runs inside this process, so that what stops it
is an exception here. Reads a list of jobs and writes one answer for each.
"""

import gc
import importlib.util
import json
import sys
from pathlib import Path


def answer(job: dict) -> dict:
    """Builds an engine for a folder and lets it continue all prompts as one batch, or tells why it could not.

    What is told is of the last time, if it is to do so several times.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    try:
        llm = LLM(
            job["folder"],
            trust_remote_code=True,
            dtype=job["dtype"],
            enforce_eager=True,
            disable_log_stats=False,
            **{"distributed_executor_backend": "uni", **job["options"]},
        )
    except Exception as error:
        return {"refusal": f"{type(error).__name__}: {error}"}
    prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"], logprobs=0)
    adapter = LoRARequest("an adapter", 1, job["adapter"]) if "adapter" in job else None
    for _ in range(job["times"]):
        answers = llm.generate(prompts, greedy, use_tqdm=False, lora_request=adapter)
    outputs = [a.outputs[0] for a in answers]
    found = {
        "tokens": [list(o.token_ids) for o in outputs],
        "log_probs": [[at[t].logprob for t, at in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs],
        "cached_tokens": sum(a.num_cached_tokens for a in answers),
        "accepted": sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"),
        "dtypes": llm.apply_model(dtypes)[0],
    }
    del llm, answers, outputs
    gc.collect()
    return found


def dtypes(model) -> dict[str, list[str]]:
    """Types of the gate's parameters and of all others."""
    found = {"gate": set(), "others": set()}
    for name, parameter in model.named_parameters():
        found["gate" if "fusion_gate" in name else "others"].add(str(parameter.dtype).removeprefix("torch."))
    return {part: sorted(names) for part, names in found.items()}


def main() -> None:
    """Answers every job."""
    for name in ("modeling_ultrafuser", "trainers", "ultrafuser", "tests"):
        if importlib.util.find_spec(name) is not None:
            raise RuntimeError(f"vLLM's environment must not contain {name}, or this would not test the saved folder.")
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))


if __name__ == "__main__":
    main()
