"""Ends of both quickstarts: a table of losses, and a reload where this package is not installed."""

import json
import subprocess
import sys
from pathlib import Path

from rich.table import Column, Table


RELOAD = """
import json, sys
for name in ("modeling_ultrafuser", "trainers", "ultrafuser"):
    sys.modules[name] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer, logging, pipeline
logging.disable_progress_bar()
logging.set_verbosity_error()
folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
said = [generate(p, max_new_tokens=new_tokens, do_sample=False)[0]["generated_text"] for p in prompts]
print(json.dumps([s if isinstance(s, str) else s[-1]["content"] for s in said]))
"""


def reload_elsewhere(folder: Path, prompts: list, new_tokens: int = 24) -> list[str]:
    """Runs `pipeline("text-generation")` in a fresh process that cannot import this package.

    Args:
        folder: Of the fused model.
        prompts: Texts to continue, or conversations, each a list of messages, to answer.
        new_tokens: Of each, at most.

    Returns:
        The continued texts, or the answers.

    Raises:
        RuntimeError: If the folder does not load there.
    """
    command = [sys.executable, "-c", RELOAD, str(folder), json.dumps(prompts), str(new_tokens)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"The saved folder {str(folder)!r} did not load in a fresh process:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def loss_table(rows: dict[str, dict[str, float]], uniform: str, unit: str = "nats per token") -> Table:
    """Makes a table of held-out losses, the best of each domain in green.

    Args:
        rows: Loss by domain, of each model by name.
        uniform: The row before which a line is drawn.
        unit: Of the losses.
    """
    domains = list(next(iter(rows.values())))
    numbers = [Column(name, justify="right") for name in (*domains, "mean")]
    losses = Table("", *numbers, title=f"\nHeld-out loss, {unit} (lower is better)", title_justify="left")
    best = {d: min(row[d] for row in rows.values()) for d in domains}
    for name, row in rows.items():
        if name == uniform:
            losses.add_section()
        cells = [f"[bold green]{row[d]:.3f}[/]" if row[d] == best[d] else f"{row[d]:.3f}" for d in domains]
        losses.add_row(name, *cells, f"{sum(row.values()) / len(row):.3f}")
    return losses
