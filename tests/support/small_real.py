"""A stand-in for a real base and its adapters, small enough to run `quickstart --real` in a test.

Imported in a process with SMALL_REAL set to the folder that `make` wrote, it puts them in the place of the package's own:

    small_real.make(folder)
    with Commands("tests.support.small_real", SMALL_REAL=folder) as commands:
        commands.run("quickstart", "--real", "--base", folder / "base", ...)
"""

import json
import os
from functools import partial
from pathlib import Path

from tests.support import adapted
from ultrafuser.quickstart import real
from ultrafuser.quickstart.real_data import Materials


DOMAINS = ("text", "math", "code")
SCHEDULE = partial(real.Schedule, steps=3, examples=2)


def make(folder: Path) -> Path:
    """Writes a base, adapters of it, and conversations."""
    adapted.make(folder)
    for file, first, count in (("gate", 0, 6), ("held_out", 50, 3)):
        rows = [conversation(domain, i) for domain in DOMAINS for i in range(first, first + count)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def conversation(domain: str, number: int) -> dict:
    """A row: one question and its answer."""
    messages = [
        {"role": "user", "content": f"{domain} {number}+{number}?"},
        {"role": "assistant", "content": f"{2 * number}. " * (1 + number % 2)},
    ]
    return {"domain": domain, "messages": messages}


def materials(folder: Path) -> Materials:
    """What `make` wrote, beside the base."""
    adapters = {name: folder / name for name in DOMAINS[1:]}
    prompts = {"text": "Hello?", "both": "1+1? And why?"}
    return Materials(adapters, folder / "gate.jsonl", folder / "held_out.jsonl", prompts, new_tokens=6)


if "SMALL_REAL" in os.environ:
    real.Materials, real.Schedule = partial(materials, Path(os.environ["SMALL_REAL"])), SCHEDULE
    # a process of its own, which imports everything: test_quickstart_real.py has it
    real.reload_elsewhere = lambda folder, conversations, new_tokens: [""]
