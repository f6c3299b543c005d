"""Runs the commands of docs/field.md one after the other, as a reader would, on small stand-ins.

    python -m tests.support.field_commands

Prints a JSON object for every command: what was done with it, and the error if there is one. What a command writes is there for
those below it: a router, a made data set, a trained model.
"""

import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path

from tests.support.pages import ROOT, TEMPLATE, Reader, lay_out, parse, why_not, write_rows


PAGE = ROOT / "docs" / "field.md"
COMMANDS = [*dict.fromkeys(re.findall(r"`(ultrafuser [^`]+ [^`]+)`", PAGE.read_text()))]
REPLACED = {"layer_swap:5,4": "layer_swap:1,1"}  # there are five layers


def stand_in(folder: Path, teacher: str) -> None:
    """Writes the models and data that the page's commands name: A, B and C, adapters, a fused model, rows."""
    from modeling_ultrafuser import UltraFuserForCausalLM
    from tests.support import adapted, tuned
    from tests.support.tiny import stir_gate, tokenizer

    made = tuned.make(folder, layers=5, tied=True)
    base = str(folder / "base")
    # marks what the assistant says, as the recipe of Mixture-of-Skills asks for
    for source in (base, *made.values()):
        tokenizer(chat_template=TEMPLATE).save_pretrained(source)
    for name, source in {"A": made["text"], "B": made["code"], "C": base, "NEW": base}.items():
        Path(name).symlink_to(source)
    model = UltraFuserForCausalLM.from_specialists(made, gate="mlp")
    stir_gate(model)
    model.save_pretrained(folder / "fused")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(base, file), folder / "fused")
    lay_out(Path.cwd(), PAGE, folder / "fused", teacher)
    for name, source in adapted.make(folder / "adapters").items():
        Path(f"lora-{name}").symlink_to(source)
    for other, name in {"clean": "text", "law": "text", "rows": "code"}.items():
        shutil.copy(f"{name}.jsonl", f"{other}.jsonl")
    shutil.copy("examples/recipes/ultrachat_tiny.yaml", "recipe.yaml")
    skills = Path("examples/recipes/mixture_of_skills.yaml")
    skills.write_text(skills.read_text().replace("Qwen/Qwen1.5-0.5B", "A"))
    Path("skills").mkdir()
    for name in ("math", "medicine", "general", "nlp"):
        shutil.copy("text.jsonl", f"skills/{name}.jsonl")
    write_rows(Path("exam.jsonl"), [{"question": "What is 2 + 2?"}])


def run(reader: Reader, command: str, number: int) -> dict:
    """Returns what was done with a command, and why."""
    for old, new in REPLACED.items():
        command = command.replace(old, new)
    words = shlex.split(command)
    parse(words)
    if why := why_not(words):
        return {"done": "parsed", "why": why}
    if "--out" in words and Path(words[words.index("--out") + 1]).exists():
        words[words.index("--out") + 1] += f"-{number}"
    if words[1] == "serve":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            words += ["--port", str(free.getsockname()[1])]
    reader.run_one(words, "What is 2 + 2?\n")
    return {"done": "run"}


def main() -> None:
    """Runs all, in a folder that is taken away."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported
    from tests.support.short_runs import make_runs_short
    from tests.support.teacher_server import TeacherServer

    with tempfile.TemporaryDirectory() as work, TeacherServer() as teacher, redirect_stdout(sys.stderr):
        os.chdir(work)
        stand_in(Path(work, "made"), teacher.url)
        make_runs_short()
        reader = Reader(True, {})
        with reader.servers:
            for number, command in enumerate(COMMANDS):
                began = time.process_time()
                try:
                    found = run(reader, command, number)
                except BaseException:
                    found = {"error": traceback.format_exc()}
                found |= {"command": command, "seconds": round(time.process_time() - began, 2)}
                print(json.dumps(found), file=sys.__stdout__, flush=True)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
