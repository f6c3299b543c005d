"""Fuses the base and its adapters, and trains a gate on what they predict, from one pass over a small set.

python -m experiments.real.fusing --base base --adapter math=math code=code --data data --out fused
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer

from modeling_ultrafuser import UltraFuserForCausalLM
from trainers import CachedGateTrainer, GateStageConfig


FILES = {"text": "prose-answered", "math": "math-gate", "code": "code-gate"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True, nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--gate", default="cross")
    parser.add_argument("--fusion", default="logits")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--rows", type=int, default=150, help="of each domain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    adapters = dict(text.split("=", 1) for text in options.adapter)
    specialists = {"text": options.base} | adapters
    model = UltraFuserForCausalLM.from_specialists(
        specialists, base=options.base, gate=options.gate, fusion=options.fusion, dtype="float32"
    )
    arguments = GateStageConfig(
        str(options.out / "stage-one"),
        max_steps=options.steps,
        learning_rate=options.rate,
        per_device_train_batch_size=len(specialists) * 2,
        examples_per_domain=4,
        max_length=256,
        bf16=False,
        seed=options.seed,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
    )
    data = {name: conversations(options.data / f"{FILES[name]}.jsonl", options.rows) for name in specialists}
    cache = options.out.parent / f"cache-{options.fusion}-{options.gate == 'evidence'}"
    CachedGateTrainer(model, arguments, data, processing_class=tokenizer, cache=cache).train()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def conversations(path: Path, rows: int) -> Dataset:
    """Rows as TRL reads them: the loss is on answers alone."""
    found = [json.loads(line)["messages"] for line in path.read_text().splitlines()[:rows]]
    return Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in found])


if __name__ == "__main__":
    main()
