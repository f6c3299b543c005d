"""vLLM as `serving.py` asks it: started by vLLM's own Python, a model per process, one line of JSON per request."""

import json
import os
import sys
import time


def main() -> None:
    """Answers until there is nothing more to read."""
    # vLLM prints what it does, and so do libraries in C
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    engine = LLM(
        sys.argv[1],
        trust_remote_code=True,
        dtype="float32",
        # compiling takes minutes on a CPU
        enforce_eager=True,
        # a prompt that comes again would cost nothing
        enable_prefix_caching=False,
        # token ids come and go
        skip_tokenizer_init=True,
        max_num_seqs=int(sys.argv[2]),
        # the engine in this process: errors arrive as they are
        distributed_executor_backend="uni",
    )
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        options = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = engine.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(
            json.dumps({"tokens": [list(o.outputs[0].token_ids) for o in outputs], "seconds": seconds}), file=answers
        )
        answers.flush()


if __name__ == "__main__":
    main()
