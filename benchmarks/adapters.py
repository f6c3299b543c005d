"""Measures specialists that are LoRA adapters of one base, beside one of them: `python -m benchmarks.adapters`.

One specialist is the base with an adapter merged into it, in transformers. Against it: three adapters on one base as a
fused model, three merged specialists fused, and PEFT's own batch of three rows with an adapter each (`adapter_names`),
which neither weighs nor fuses what they say. Weights are random, of a size that is bound by reading them; adapters have
rank 16 and are on all linear layers.

Times are process CPU seconds of one thread, ways taking turns within each round, and every number is the ratio to one
specialist in the same round: the median over rounds, with the smallest and the largest. All ways must say the same
first. Writes `results/adapters.json`.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, set_seed
from transformers.utils import logging

from benchmarks.timing import compare_ways
from modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.provenance import provenance


RESULTS = Path(__file__).parent.parent / "results" / "adapters.json"
# 81 million parameters
SHAPE = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "vocab_size": 16384,
}
SPECIALISTS, RANK = ("text", "code", "math"), 16
CONTEXT, STEPS, PROMPT = 32, 12, 128


def main() -> None:
    """Measures, prints and writes what every way costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        adapted, mixed = made(Path(folder))
    merged = UltraFuserForCausalLM.from_specialists({n: adapted.specialist(n) for n in SPECIALISTS}).eval()
    # a gate with opinions
    for parameter in adapted.model.fusion_gate.parameters():
        nn.init.normal_(parameter, std=0.02)
    merged.model.fusion_gate = adapted.model.fusion_gate
    models = {
        "one specialist, merged": merged.specialist("text"),
        "three adapters on one base, fused": adapted,
        "three merged specialists, fused": merged,
        "three adapters in one batch of PEFT's": mixed,
    }
    check_alike(models)
    result = {"provenance": provenance(), "rounds": options.rounds, "shape": SHAPE, "rank": RANK}
    ways = {name: partial(seconds, model) for name, model in models.items()}
    for run in ways.values():
        run()
    result["ways"] = compare_ways(ways, options.rounds)
    for name, model in models.items():
        result["ways"][name]["bytes of weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
        print(f"{name}: {result['ways'][name]}", flush=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def made(folder: Path) -> tuple[UltraFuserForCausalLM, PeftModel]:
    """Random adapters of a random base, as PEFT saves them, fused; and in PEFT."""
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(folder / "base")
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    for name in SPECIALISTS:
        get_peft_model(base(folder), config).save_pretrained(folder / name)
    fused = UltraFuserForCausalLM.from_specialists({name: folder / name for name in SPECIALISTS})
    mixed = PeftModel.from_pretrained(base(folder), folder / "text", adapter_name="text")
    for name in SPECIALISTS[1:]:
        mixed.load_adapter(folder / name, adapter_name=name)
    return fused.eval(), mixed.eval()


def base(folder: Path) -> PreTrainedModel:
    """The base, loaded anew."""
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def said(model: PreTrainedModel, ids: Tensor, **inputs) -> Tensor:
    """Logits at the last position; of PEFT's, of each adapter. Shape (rows, vocab)."""
    if isinstance(model, PeftModel):
        ids, inputs = ids.expand(len(SPECIALISTS), -1), inputs | {"adapter_names": list(SPECIALISTS)}
    return model(input_ids=ids, logits_to_keep=1, **inputs).logits[:, -1]


def check_alike(models: dict[str, PreTrainedModel]) -> None:
    """Stops before anything is measured that does not say the same."""
    one, adapted, merged, mixed = models.values()
    ids = torch.randint(3, 1000, (1, CONTEXT))
    alike = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    alike(said(adapted, ids), said(merged, ids))
    alike(said(mixed, ids), torch.cat([said(adapted.specialist(name), ids) for name in SPECIALISTS]))
    alike(said(mixed, ids)[:1], said(one, ids))


def seconds(model: PreTrainedModel) -> dict[str, float]:
    """Measures a step, and reading a prompt."""
    return {"step": steps(model), "prompt": prompt(model)}


def steps(model: PreTrainedModel) -> float:
    """Seconds for a token, once the context is in the cache."""
    ids = torch.randint(3, 1000, (1, CONTEXT + STEPS))
    cache = DynamicCache(config=model.config)
    said(model, ids[:, :CONTEXT], past_key_values=cache, use_cache=True)
    start = time.process_time()
    for i in range(CONTEXT, CONTEXT + STEPS):
        said(model, ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    return (time.process_time() - start) / STEPS


def prompt(model: PreTrainedModel) -> float:
    """Seconds for reading a prompt and saying the next token."""
    ids = torch.randint(3, 1000, (1, PROMPT))
    start = time.process_time()
    said(model, ids)
    return time.process_time() - start


if __name__ == "__main__":
    main()
