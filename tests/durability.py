"""Kills commands at random moments and fills their disks, runs them again, and counts: `python -m tests.durability`.

Each command is killed at a random change of its files, as hard as can be, several times, and is given disks of several
sizes. Whatever happened, the same command with room must then leave what it leaves undisturbed. The counts go to
`results/durability.json`.
"""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.killing import Commands
from tests.teacher_server import TeacherServer, write_recipe


RESULTS = Path(__file__).parents[1] / "results" / "durability.json"
NAMES = ["text", "code", "math"]
# in which the same work differs from run to run: times, speeds, and who wrote last
VARYING = re.compile(r"(\.ultrafuser(\.lock)?|journal\.jsonl|results\.json|scores/.*|.*\.lock|.*-cache/.*)$")


def make_inputs(root: Path) -> None:
    """Three specialists, a fused model of them, and rows to train on and to measure with."""
    import torch

    from modeling_ultrafuser import UltraFuserForCausalLM
    from tests.conftest import stir_gate
    from tests.tiny import specialist, tokenizer
    from tests.training import CHAT_TEMPLATE, conversations

    torch.manual_seed(0)
    for name in NAMES:
        specialist(layers=1).save_pretrained(root / name)
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(root / name)
        rows = conversations(12)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = [{**row, "domain": name, "topic": "", "source": "s", "licence": "mit"} for row in rows]
        (root / f"{name}-records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    model = UltraFuserForCausalLM.from_specialists({name: root / name for name in NAMES})
    stir_gate(model)
    model.save_pretrained(root / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(root / "fused")
    origins = {name: {"source": str(root / name)} for name in NAMES}
    (root / "fused" / "specialists.json").write_text(json.dumps(origins))


def commands(root: Path, recipe: Path) -> dict:
    """Words of each command, without its output."""
    fused, pairs = root / "fused", [f"{name}={root / name}" for name in NAMES]
    data = [word for name in NAMES[:2] for word in ("--data", f"{name}={root / name}.jsonl")]
    small = ["--examples_per_domain", 2, "--per_device_train_batch_size", 2, "--report_to", "none", "--max-steps", 2]
    return {
        "fuse": ["fuse", *pairs],
        "refer": ["refer", fused],
        "add": ["add", fused, f"more={root / 'text'}"],
        "remove": ["remove", fused, "math"],
        "specialist": ["specialist", fused, "code"],
        "gates": ["gates", "--model", fused, *data, *small, "--gate", "linear", "--gate", "constant"],
        "train": ["train", "--resume", "--stage", "gate", "--model", fused, *data, *small, "--save_steps", 1],
        "evaluate": ["evaluate", fused, *data, "--prompt-tokens", 2, "--max-length", 48],
        "data make": ["data", "make", recipe],
        "data clean": ["data", "clean", *(root / f"{n}-records.jsonl" for n in NAMES), "--processes", 1]
        + ["--skip", "language", "--shortest", 1, "--overwrite"],
        "data look": ["data", "look", *(root / f"{name}-records.jsonl" for name in NAMES)],
    }


def digests(out: Path) -> dict[str, str]:
    """What a command left, but for what differs from run to run."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not VARYING.search(name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def outcome(out: Path) -> dict:
    """What must be the same however often a command was stopped: files, and losses that were measured."""
    found = digests(out)
    if (out / "results.json").exists():
        found["rows"] = {row["name"]: row["loss"] for row in json.loads((out / "results.json").read_text())["rows"]}
    return found


# numbers of a training state that depend on the machine's clock, or on how often it began
CLOCK = ("training_args.bin", "trainer_state.json", "rng_state.pth")


def same(one: dict, other: dict) -> bool:
    """Whether two outcomes are one."""
    kept = [{k: v for k, v in found.items() if not k.endswith(CLOCK)} for found in (one, other)]
    return kept[0] == kept[1]


def beside(folder: Path) -> list[str]:
    """What lies around that no user would keep."""
    return sorted(p.name for p in folder.iterdir() if p.name not in ("out", "out-cache"))


def kills(runner: Commands, words: list, count: int, rng: random.Random, folder: Path) -> dict:
    """Kills a command at random changes, and has it run to its end each time."""
    whole = runner.run(*words, "--out", folder / "out", under=folder)
    assert whole.code == 0, whole.said
    expected, events = outcome(folder / "out"), len(whole.events)
    survived, faults = 0, []
    for at in sorted(rng.sample(range(events), min(count, events))):
        shutil.rmtree(folder)
        folder.mkdir()
        killed = runner.run(*words, "--out", folder / "out", under=folder, kill_at=at)
        done = runner.run(*words, "--out", folder / "out", under=folder)
        # killed after the folder was put in place, it is whole, and left alone
        ended = done.code == 0 or "is there and not empty" in done.said
        found = outcome(folder / "out") if ended else {}
        if ended and same(found, expected) and not beside(folder):
            survived += killed.code is None
        else:
            faults.append({"at": whole.events[at], "then": done.said[-300:], "beside": beside(folder)})
    return {"changes": events, "kills": min(count, events), "survived": survived, "faults": faults}


def disks(runner: Commands, words: list, sizes: list[int], folder: Path) -> dict:
    """Gives a command disks of several sizes in kilobytes, then one with room."""
    found = {"sizes": sizes, "full": 0, "in_a_sentence": 0, "same_with_room": 0, "faults": []}
    expected = None
    for size in [65_536, *sizes]:
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
        try:
            done = runner.run(*words, "--out", folder / "out")
            if expected is None:
                assert done.code == 0, done.said
                expected = outcome(folder / "out")
                continue
            if done.code:
                found["full"] += 1
                sentence = done.code == 2 and "Traceback" not in done.said and "full" in done.said
                sentence = sentence or (done.code == 2 and " free" in done.said)
                found["in_a_sentence"] += sentence
                if not sentence:
                    found["faults"].append({"size": size, "code": done.code, "said": done.said[-300:]})
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            again = runner.run(*words, "--out", folder / "out") if done.code else done
            if again.code == 0 and same(outcome(folder / "out"), expected):
                found["same_with_room"] += 1
            else:
                found["faults"].append({"size": size, "again": again.said[-300:]})
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    return found


def main() -> None:
    """Counts, and writes the counts: [KILLS [SEED]]."""
    given = [*map(int, sys.argv[1:])]
    count, seed = (*given, *(12, 0)[len(given) :])
    rng, found = random.Random(seed), {"seed": seed, "commands": {}}
    with tempfile.TemporaryDirectory() as place, TeacherServer() as server:
        root = Path(place)
        make_inputs(root)
        recipe = write_recipe(root / "recipe", server.url)
        modules = ("fusing", "editing", "referring", "gates", "training", "evaluation.evaluating", "data.running")
        modules = *(f"ultrafuser.{name}" for name in modules), "ultrafuser.data.cleaning", "ultrafuser.data.looking"
        with Commands(*modules, "transformers.trainer", HF_HUB_OFFLINE="1") as runner:
            for name, words in commands(root, recipe).items():
                (root / "kills").mkdir()
                entry = kills(runner, words, count, rng, root / "kills")
                shutil.rmtree(root / "kills")
                sizes = [4, 128, 1024]
                entry["disks"] = disks(runner, words, sizes, root / "disk")
                found["commands"][name] = entry
                print(name, json.dumps(entry), flush=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
