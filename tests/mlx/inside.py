"""What mlx-lm says, in a process of its environment: `python inside.py JOBS ANSWERS`. Run by `check_mlx.py`."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load


def answer(job: dict) -> dict:
    """Converts a folder, and continues each prompt, greedily and with a cache."""
    target = job["folder"] + "-mlx"
    done = subprocess.run([sys.executable, job["file"], job["folder"], target], capture_output=True, text=True)
    if done.returncode != 0:
        return {"refusal": done.stderr[-2000:]}
    # the tokenizer, too, which must need neither torch nor code of ours
    model, words = load(target, trust_remote_code=True)
    found = [greedy(model, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    tokens, log_probs = zip(*found, strict=True)
    return {"tokens": tokens, "log_probs": log_probs, "words": words.encode("2 + 2", add_special_tokens=False)}


def greedy(model, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest next tokens, and their log-probabilities."""
    cache, read, tokens, log_probs = make_prompt_cache(model), prompt, [], []
    for _ in range(new_tokens):
        logits = model(mx.array([read]), cache)[0, -1].astype(mx.float32)
        tokens.append(int(mx.argmax(logits)))
        log_probs.append(float(logits[tokens[-1]] - mx.logsumexp(logits)))
        read = tokens[-1:]
    return tokens, log_probs


def main() -> None:
    """Answers every job."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(job) for job in jobs]))


if __name__ == "__main__":
    main()
