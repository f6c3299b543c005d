"""Puts a tuned adapter into the package, for `ultrafuser quickstart --real`, with a card.

python -m experiments.real.shipping --adapter math=math code=code_adapter
"""

import argparse
import json
import shutil
from pathlib import Path

from ultrafuser.quickstart.real_base import COMMIT, MODEL
from ultrafuser.quickstart.real_data import HERE


ABOUT = {
    "math": {
        "title": "Mathematics with worked steps",
        "does": "Sums, differences, products of two-digit numbers, linear equations and word problems, each in steps that end "
        "in a line `Answer: NUMBER`; and some modules of the Mathematics Dataset.",
        "data": "14,000 generated items and 2,000 of `mathematics-dataset` 1.0.1 (Apache-2.0), as `experiments/real/dataset.py` "
        "draws them. A tenth of all contents, by hash, is held out, and whole modules are.",
    },
    "code": {
        "title": "Small Python functions",
        "does": "Writes a short function from a sentence or a docstring: lists of numbers, strings, dictionaries; and a function "
        "`solve()` for a word problem.",
        "data": "5,000 generated tasks with tests, 800 word problems with a program, and documented functions of the standard library and of installed "
        "packages, as `experiments/real/dataset.py` draws them. A tenth of all contents, by hash, is held out.",
    },
}
CARD = """---
license: apache-2.0
base_model: {model}
library_name: peft
pipeline_tag: text-generation
tags: [lora, peft]
language: en
---

# {title}: a LoRA adapter of {name}

{does}

| | |
|---|---|
| base | {model} at `{commit}`; tuned on the weights of its Q4_1 GGUF file, dequantised |
| adapter | LoRA of rank {rank} on all linear layers of the blocks, in bfloat16 |
| data | {data} |
| steps | {steps}, of two rows of 512 tokens, in which conversations that do not see each other share a system message |
| seed | 0 |
| licence | Apache-2.0, as the base |

Made by `python -m experiments.real.dataset --out data --seed 0` and
`python -m experiments.real.tuning --base base --data data/{kind}.jsonl --out {kind} --rank {rank} --steps {steps} --compile`.

It is a specialist for `ultrafuser quickstart --real`, of 135 million parameters: it is right more often than its base in its
own domain, and nothing that it says may be relied on.
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, nargs="+", metavar="NAME=FOLDER")
    for name, folder in (text.split("=", 1) for text in parser.parse_args().adapter):
        ship(name, Path(folder), HERE / "specialists" / name)


def ship(kind: str, source: Path, out: Path) -> None:
    """Copies an adapter, names its base as the Hub does, and writes its card."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": MODEL,
        "revision": COMMIT,
        "target_modules": sorted(config["target_modules"]),
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copy(source / "adapter_model.safetensors", out)
    steps = json.loads((source / "log.jsonl").read_text().splitlines()[-1])["step"]
    about = {"kind": kind, "model": MODEL, "name": MODEL.split("/")[1], "commit": COMMIT, "rank": config["r"]}
    (out / "README.md").write_text(CARD.format(**about, steps=steps, **ABOUT[kind]), encoding="utf-8")
    print(f"{out}: rank {config['r']}, {steps} steps, {(out / 'adapter_model.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
