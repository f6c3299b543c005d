"""Stops commands in every way at random moments, and counts what is lost: `python -m tests.durability`.

Each command is killed as hard as can be at random changes of its files, sent SIGTERM and SIGINT (Ctrl-C) at random
moments, run twice at once, given disks of several sizes, and one that cannot be written. Whatever happened, the same
command with room must then leave what it leaves undisturbed. The counts go to `results/durability.json`.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.judge_server import Server as Judge
from tests.support.killing import Commands, Done
from tests.support.teacher_server import TeacherServer, write_recipe


RESULTS = Path(__file__).parents[1] / "results" / "durability.json"
NAMES = ["text", "code", "math"]
SIZES = [4, 128, 1024]  # of disks, in kilobytes
SIGNALS = {"SIGTERM": (-signal.SIGTERM, 143), "SIGINT": (-signal.SIGINT, 130)}  # and how a command may end then
AT_A_TIME = 8  # requests of one command, which may be under way when it is stopped
# put in place in one step: there is nothing before
AT_ONCE = ("fuse", "refer", "add", "remove", "specialist", "gates", "data take-in")
# in which the same work differs from run to run: times, speeds, and who wrote last
VARYING = re.compile(r"(\.ultrafuser(\.lock)?|journal\.jsonl|results\.json|scores/.*|.*\.lock|.*-cache/.*)$")


def make_inputs(root: Path) -> None:
    """Three specialists, a fused model of them, and rows to train on and to measure with."""
    import torch

    from modeling_ultrafuser import UltraFuserForCausalLM
    from tests.support.conversations import CHAT_TEMPLATE, conversations
    from tests.support.tiny import specialist, stir_gate, tokenizer

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
    questions = [{"id": str(n), "turns": [f"What is 2 + {n}?"], "reference": [f"{2 + n}"]} for n in range(6)]
    (root / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    origins = {name: {"source": str(root / name)} for name in NAMES}
    (root / "fused" / "specialists.json").write_text(json.dumps(origins))


def commands(root: Path, recipe: Path, judge: str) -> dict:
    """Words of each command, without its output."""
    fused, pairs = root / "fused", [f"{name}={root / name}" for name in NAMES]
    data = [word for name in NAMES[:2] for word in ("--data", f"{name}={root / name}.jsonl")]
    small = ["--examples_per_domain", 2, "--per_device_train_batch_size", 2, "--report_to", "none", "--max-steps", 2]
    stage = ["--model", fused, *data, *small, "--save_steps", 1]
    records = [root / f"{name}-records.jsonl" for name in NAMES]
    clean = ["data", "clean", *records, "--skip", "language", "--shortest", 1, "--overwrite", "--processes", 1]
    judged = ["--questions", root / "questions.jsonl", "--judge", "judge", "--judge-url", judge]
    return {
        "fuse": ["fuse", *pairs],
        "refer": ["refer", fused],
        "add": ["add", fused, f"more={root / 'text'}"],
        "remove": ["remove", fused, "math"],
        "specialist": ["specialist", fused, "code"],
        "gates": ["gates", "--model", fused, *data, *small, "--gate", "linear", "--gate", "constant"],
        "train": ["train", "--resume", "--stage", "gate", *stage],
        "train, cached": ["train", "--resume", "--stage", "gate", "--cached", *stage],
        "distil": ["distil", "--resume", "--student", "text", "--max_completion_length", 4, *stage],
        "evaluate": ["evaluate", fused, *data, "--prompt-tokens", 2, "--max-length", 48],
        "judge": ["judge", fused, *judged, "--method", "grading", "--max-new-tokens", 4, "--batch-size", 2],
        "data make": ["data", "make", recipe],
        "data take-in": ["data", "take-in", root / "text.jsonl", "--domain", "text", "--licence", "mit"],
        "data clean": clean,
        "data look": ["data", "look", *records],
    }


def digests(out: Path) -> dict[str, str]:
    """What a command left, but for what differs from run to run."""
    if out.is_file():
        return {"": hashlib.sha256(out.read_bytes()).hexdigest()}
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not VARYING.search(name):
            # replies come in any order
            content = (
                b"".join(sorted(path.read_bytes().splitlines(True))) if path.suffix == ".jsonl" else path.read_bytes()
            )
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def outcome(out: Path) -> dict:
    """What must be the same however often a command was stopped: files, and losses that were measured."""
    found = digests(out)
    if (out / "results.json").exists():
        results = json.loads((out / "results.json").read_text())
        found["rows"] = {row["name"]: row["loss"] for row in results.get("rows", [])}
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


@contextmanager
def emptied(folder: Path):
    """A folder with nothing in it, before and after."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class Trial:
    """One command, what it leaves undisturbed, and everything that is done to it.

    Attributes:
        faults: What was not as it should be.
        done: How it went undisturbed.
    """

    def __init__(self, name: str, words: list, runner: Commands, folder: Path, calls: Callable[[], int]):
        self.name, self.words, self.runner, self.folder, self.calls = name, words, runner, folder, calls
        self.faults: list[dict] = []
        with emptied(folder):
            before = calls()
            self.done = self.run(under=folder)
            assert self.done.code == 0, self.done.said
            self.expected, self.whole_calls = outcome(folder / "out"), calls() - before

    def run(self, **how) -> Done:
        return self.runner.run(*self.words, "--out", self.folder / "out", **how)

    def stopped(self, where: dict, codes: tuple, **how) -> bool:
        """Whether nothing was lost by a stop."""
        with emptied(self.folder):
            before = self.calls()
            first = self.run(**how)
            out, faults = self.folder / "out", []
            if first.code not in (0, *codes) or "Traceback" in first.said or "Exception ignored" in first.said:
                faults.append({"code": first.code, "said": first.said[-600:]})
            if first.left:
                faults.append({"processes that went on": first.left})
            if self.name in AT_ONCE and digests(out) and not same(outcome(out), self.expected):
                faults.append({"half written": sorted(digests(out))[:5]})
            again = self.run()
            # stopped after the folder was put in place, it is whole, and left alone
            ended = again.code == 0 or "Nothing is overwritten unasked" in again.said
            if not ended or not same(outcome(out), self.expected) or beside(self.folder):
                faults.append({"then": again.said[-600:], "beside": beside(self.folder)})
            if (more := self.calls() - before - self.whole_calls) > AT_A_TIME:
                faults.append({"asked again": more})
        self.faults += [{**where, **fault} for fault in faults]
        return not faults

    def kills(self, count: int, rng: random.Random) -> dict:
        """Kills it at random changes of its files."""
        events = self.done.events
        moments = sorted(rng.sample(range(len(events)), min(count, len(events))))
        kills = [self.stopped({"at": events[n]}, (None,), under=self.folder, kill_at=n) for n in moments]
        return {"changes": len(events), "kills": len(kills), "survived": sum(kills)}

    def signals(self, name: str, count: int, rng: random.Random) -> dict:
        """Sends it a signal at random moments."""
        number, (least, most) = getattr(signal, name), (0.0, self.done.seconds)
        moments = sorted(rng.uniform(least, most) for _ in range(count))
        codes = SIGNALS[name]
        stops = [self.stopped({name: f"{at:.3f} s"}, codes, send=number, after=at) for at in moments]
        return {"sent": count, "survived": sum(stops)}

    def twice(self, other: Commands) -> dict:
        """Runs it twice at once. Both may end well only where the second one had nothing left to do."""
        with emptied(self.folder), ThreadPoolExecutor(2) as pool:
            words = *self.words, "--out", self.folder / "out"
            both = [*pool.map(lambda runner: runner.run(*words), (self.runner, other))]
            refusals = [done for done in both if done.code]
            told = [
                d for d in refusals if d.code == 2 and ("another one is writing" in d.said or "is there" in d.said)
            ]
            held = told == refusals and len(told) < 2 and same(outcome(self.folder / "out"), self.expected)
            if not held or beside(self.folder):
                self.faults.append({"twice": [d.said[-300:] for d in both], "beside": beside(self.folder)})
        return {"one told": len(refusals), "held": held}

    def disks(self) -> dict:
        """Gives it disks of several sizes in kilobytes, then room; and a disk that cannot be written."""
        found = {"sizes": SIZES, "full": 0, "in_a_sentence": 0, "same_with_room": 0}
        for size in SIZES:
            with disk(self.folder, f"size={size}k") as remount:
                done = self.run()
                if done.code:
                    found["full"] += 1
                    sentence = in_a_sentence(done) and ("full" in done.said or " free" in done.said)
                    found["in_a_sentence"] += sentence
                    if not sentence:
                        self.faults.append({"size": size, "code": done.code, "said": done.said[-600:]})
                remount("size=64m")
                again = self.run() if done.code else done
                if again.code == 0 and same(outcome(self.folder / "out"), self.expected):
                    found["same_with_room"] += 1
                else:
                    self.faults.append({"size": size, "again": again.said[-600:]})
        with disk(self.folder, "size=64m") as remount:
            remount("ro")
            done = self.run()
            found["read_only_told"] = in_a_sentence(done) and "cannot be written" in done.said
            if not found["read_only_told"]:
                self.faults.append({"read-only": done.said[-600:]})
        return found


def in_a_sentence(done: Done) -> bool:
    return done.code == 2 and "Traceback" not in done.said


@contextmanager
def disk(folder: Path, options: str):
    """A file system of its own, and what changes its options."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, options, "tmpfs", folder], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def run(kills: int, signals: int, seed: int, only: list[str] | None = None) -> dict:
    """Does everything to every command, or to some.

    Args:
        kills: Of each command.
        signals: Of each command and kind.
        seed: Of the moments.
        only: Names of commands.
    """
    modules = (
        *("build.fusion_recipe", "build.specialist_edits", "build.reference", "train.gate_search"),
        *("train.stage_recipe", "train.distil_recipe", "evaluation.evaluation_run", "evaluation.judgements"),
    )
    modules += ("data.synthesis_run", "data.cleaning", "data.dataset_report", "data.sources")
    modules = *(f"ultrafuser.{name}" for name in modules), "transformers.trainer"
    found = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server, judge = stack.enter_context(TeacherServer()), Judge()
        stack.callback(judge.close)
        runner, other = (stack.enter_context(Commands(*modules, HF_HUB_OFFLINE="1")) for _ in range(2))
        make_inputs(root)
        table = commands(root, write_recipe(root / "recipe", server.url), judge.url)
        calls = lambda: len(server.answered) + sum(judge.asked().values())  # noqa: E731
        for name in only or table:
            rng = random.Random(f"{seed} {name}")
            trial = Trial(name, table[name], runner, root / "work", calls)
            found[name] = {
                **trial.kills(kills, rng),
                **{kind: trial.signals(kind, signals, rng) for kind in SIGNALS},
                "twice": trial.twice(other),
                "disks": trial.disks(),
                "faults": trial.faults,
            }
            print(name, json.dumps(found[name]), flush=True)
    return {"seed": seed, "commands": found}


def main() -> None:
    """Counts, and writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each command")
    parser.add_argument("--signals", type=int, default=5, help="of each command and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of commands; the others keep their counts")
    parser.add_argument("--dry", action="store_true", help="print the counts and write nothing")
    options = parser.parse_args()
    found = run(options.kills, options.signals, options.seed, options.only)
    if not options.dry:
        earlier = json.loads(RESULTS.read_text())["commands"] if options.only else {}
        found["commands"] = earlier | found["commands"]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
