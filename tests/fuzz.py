"""Damages files at random, gives them to the commands, and counts what becomes of it.

python -m tests.fuzz --seed 0 --mutations 2000

Stopped, it goes on where it was. Every mutation ends in one of these:

- right: what was given is loaded, and holds what its files say. Fused models hold, bit for bit, the tensors of the files,
  all of them and no others; tokenizers split and join samples of text as before; adapters say what PEFT makes of them;
  references rebuild the very model that they were made from. A number in a configuration that changes what is computed
  and not what is loaded, such as the base of rotary positions, is the statement of whoever wrote the file; so are the
  numbers in a tensor.
- words: refused with an error that a command turns into a sentence and exit status 2.
- inside: an error from inside, which a command would show as a traceback.
- other: loaded, and something else than the files say.
- slow, memory, dead: more than 20 seconds of a processor or two minutes by the clock, more than 2 GB, or the process is
  gone.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import get_context
from pathlib import Path

import tests.conftest  # noqa: F401


# isort: split
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.damage import damage_json, damage_kind, damage_weights, damage_yaml
from tests.support.expectations import Other, expect_files, expect_specialist, same, tensors_of
from tests.support.fuzz_inputs import FAMILIES, SAMPLES, Inside, build, quietly


RESULT = Path(__file__).parents[1] / "results" / "fuzz.json"
KINDS = ("configurations", "weights", "tokenizers", "adapters", "references", "recipes")
OUTCOMES = ("right", "words", "inside", "other", "slow", "memory", "dead")
SECONDS, SECONDS_BY_CLOCK, BYTES = 20, 120, 2 << 30


# ---------------------------------------------------------------------------------- what becomes of it


def in_python(call, *arguments, **options):
    """What a call returns, or None if it is refused in words."""
    try:
        return call(*arguments, **options)
    except (ValueError, OSError) as error:
        if re.search("not enough memory|bad alloc|MemoryError", str(error)):
            raise MemoryError from error
        return None
    except MemoryError:
        raise
    except Exception as error:
        raise Inside("".join(traceback.format_exception(error))[-3000:]) from error


def configurations(dice: random.Random, base: Path, scratch: Path) -> bool:
    family = dice.choice(FAMILIES)
    if dice.random() < 0.5:
        shutil.copytree(base / family / "code", scratch / "code")
        target = (
            scratch / "code" / dice.choice(("config.json", "config.json", "config.json", "generation_config.json"))
        )
        damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
        return _fused_with(dice, base / family / "text", scratch / "code", scratch)
    shutil.copytree(base / family / "fused", scratch / "fused")
    names = ("config.json", "config.json", "config.json", "generation_config.json")
    target = scratch / "fused" / dice.choice(names)
    damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
    return _opened(dice, scratch / "fused", scratch)


def weights(dice: random.Random, base: Path, scratch: Path) -> bool:
    family, which = dice.choice(FAMILIES), dice.choice(("code", "code", "fused", "fused", "sharded"))
    folder = scratch / which
    shutil.copytree(base / family / which, folder)
    files = sorted(folder.glob("*.safetensors*"))
    target = dice.choice(files)
    if dice.random() < 0.03:
        damage_kind(dice, target)
    elif target.suffix == ".json":
        damage_json(dice, target)
    else:
        damage_weights(dice, target)
    if which == "code":
        return _fused_with(dice, base / family / "text", folder, scratch)
    return _opened(dice, folder, scratch)


def _fused_with(dice: random.Random, good: Path, folder: Path, scratch: Path) -> bool:
    how = dice.randrange(4)
    if how == 0:
        return quietly(["check", str(good), str(folder)])
    if how == 1:
        if not quietly(["fuse", f"text={good}", f"code={folder}", "--out", str(scratch / "out")]):
            return False
        model = UltraFuserForCausalLM.from_pretrained(scratch / "out")
    else:
        model = in_python(UltraFuserForCausalLM.from_specialists, {"text": good, "code": folder})
        if model is None:
            return False
    expect_specialist(model, "code", folder)
    return True


def _opened(dice: random.Random, folder: Path, scratch: Path) -> bool:
    how = dice.randrange(5)
    if how == 0:
        done = quietly(["explain", str(folder), SAMPLES[0], "--json"])
    elif how == 1:
        done = quietly(["specialist", str(folder), "code", "--out", str(scratch / "out")])
    elif how == 2:
        done = quietly(["explain", str(folder), SAMPLES[0], "--json", "--generate", "4"])
    else:
        done = in_python(UltraFuserForCausalLM.from_pretrained, folder) is not None
    if done:
        expect_files(UltraFuserForCausalLM.from_pretrained(folder), folder, scratch)
    return done


def tokenizers(dice: random.Random, base: Path, scratch: Path) -> bool:
    folder = scratch / "code"
    shutil.copytree(base / "llama" / "code", folder)
    target = folder / dice.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
    if dice.random() < 0.2:
        fused = scratch / "fused"
        shutil.copytree(base / "llama" / "fused", fused, ignore=shutil.ignore_patterns("tokenizer*"))
        for file in folder.glob("tokenizer*"):
            shutil.copy(file, fused) if file.is_file() and not file.is_symlink() else None
        return quietly(["explain", str(fused), SAMPLES[0], "--json"])
    if not _fused_tokenizer(dice, base, folder, scratch):
        return False
    good, bad = (AutoTokenizer.from_pretrained(f) for f in (base / "llama" / "text", folder))
    for text in SAMPLES:
        if good.encode(text, add_special_tokens=False) != bad.encode(text, add_special_tokens=False):
            raise Other(f"{text!r} is split otherwise")
        ids = good.encode(text, add_special_tokens=False)
        if good.backend_tokenizer.decode(ids) != bad.backend_tokenizer.decode(ids):
            raise Other(f"{text!r} is joined otherwise")
    return True


def _fused_tokenizer(dice: random.Random, base: Path, folder: Path, scratch: Path) -> bool:
    good = base / "llama" / "text"
    if dice.random() < 0.5:
        return quietly(["check", str(good), str(folder)])
    return quietly(
        ["fuse", f"text={good}", f"code={folder}", "--chat-template", "text", "--out", str(scratch / "out")]
    )


def adapters(dice: random.Random, base: Path, scratch: Path) -> bool:
    folder, good = scratch / "two", base / "adapters" / "one"
    shutil.copytree(base / "adapters" / "two", folder)
    if dice.random() < 0.6:
        target = folder / "adapter_config.json"
        damage_kind(dice, target) if dice.random() < 0.02 else damage_json(dice, target)
    else:
        target = folder / "adapter_model.safetensors"
        damage_kind(dice, target) if dice.random() < 0.02 else damage_weights(dice, target)
    if dice.random() < 0.3:
        return quietly(["check", str(good), str(folder)])
    model = in_python(UltraFuserForCausalLM.from_specialists, {"one": good, "two": folder})
    if model is None:
        return False
    ids = torch.arange(3, 20)[None]
    try:
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "llama" / "text"), folder)
    except Exception:  # noqa: BLE001
        # what PEFT cannot read has been read as its tensors say
        return True
    with torch.no_grad():
        ours, theirs = model.specialist("two")(ids).logits, theirs(ids).logits
    if not torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3):
        raise Other("PEFT says something else")
    return True


def references(dice: random.Random, base: Path, scratch: Path) -> bool:
    folder = scratch / "refs"
    shutil.copytree(base / "refs", folder)
    target = dice.choice((*[folder / "refs.yaml"] * 5, *sorted(folder.iterdir())))
    if dice.random() < 0.02:
        damage_kind(dice, target)
    elif target.suffix == ".yaml":
        damage_yaml(dice, target)
    elif target.suffix == ".safetensors":
        damage_weights(dice, target)
    else:
        damage_json(dice, target)
    recipe = str(folder / "refs.yaml")
    if dice.random() < 0.3:
        return quietly(["fuse", recipe, "--dry-run"])
    if not quietly(["fuse", recipe, "--out", str(scratch / "out")]):
        return False
    ours, theirs = tensors_of(scratch / "out"), tensors_of(base / "whole")
    if ours.keys() != theirs.keys() or not all(same(ours[k], theirs[k]) for k in ours):
        raise Other("the weights are others")
    for file in ("config.json", "tokenizer.json"):
        if (scratch / "out" / file).read_bytes() != (base / "whole" / file).read_bytes():
            raise Other(f"{file} is another")
    return True


def recipes(dice: random.Random, base: Path, scratch: Path) -> bool:
    name = dice.choice(("fuse.yaml", "train.yaml", "gate.yaml", "joint.yaml", "ultrachat.yaml", "ultrachat_tiny.yaml"))
    target = Path(shutil.copy(base / "recipes" / name, scratch))
    damage_kind(dice, target) if dice.random() < 0.02 else damage_yaml(dice, target)
    if name == "fuse.yaml":
        return quietly(["fuse", str(target), "--dry-run"])
    if name.startswith("ultrachat"):
        return quietly(["data", "plan", str(target)])
    words = ["train", str(target), "--out", str(scratch / "out"), "--max-steps", "1"]
    if name == "train.yaml":
        return quietly(words) and in_python(UltraFuserForCausalLM.from_pretrained, scratch / "out") is not None
    # what it names is not there, so that it ends before anything is trained
    return quietly([*words, "--model", str(scratch / "none")])


RUN = {run.__name__: run for run in (configurations, weights, tokenizers, adapters, references, recipes)}


def outcome(kind: str, seed: int, number: int, base: Path) -> dict:
    """What becomes of one mutation."""
    dice, start = random.Random(f"{kind} {seed} {number}"), sum(os.times()[:4])
    found = {"kind": kind, "number": number}
    here, environment = os.getcwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                os.chdir(scratch)
                found["outcome"] = "right" if RUN[kind](dice, base, Path(scratch)) else "words"
        except Other as error:
            found |= {"outcome": "other", "why": str(error)}
        except MemoryError as error:
            found |= {"outcome": "memory", "why": str(error)}
        except Inside as error:
            found |= {"outcome": "inside", "why": str(error)}
        except Exception as error:  # noqa: BLE001, what is done with the outcome is a part of the outcome
            found |= {"outcome": "inside", "why": "".join(traceback.format_exception(error))[-3000:]}
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(environment)
    # by the processor, because others may be at work beside this
    found["seconds"] = round(sum(os.times()[:4]) - start, 2)
    if found["seconds"] > SECONDS:
        found["outcome"] = "slow"
    return found


# ---------------------------------------------------------------------------------- all of them


def _work(tasks: list[tuple[str, int]], seed: int, base: Path, journal: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with journal.open("a") as file:
        for kind, number in tasks:
            file.write(json.dumps({"begun": [kind, number], "at": time.time()}) + "\n")
            file.flush()
            file.write(json.dumps(outcome(kind, seed, number, base)) + "\n")
            file.flush()


def _read(journal: Path) -> list[dict]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def _watched(tasks: list[tuple[str, int]], seed: int, base: Path, journal: Path) -> None:
    """Runs tasks in a process that is started anew whenever one of them takes too long or kills it."""
    while True:
        lines = _read(journal)
        done = {(line["kind"], line["number"]) for line in lines if "outcome" in line}
        left = [task for task in tasks if task not in done]
        if not left:
            return
        process = get_context("fork").Process(target=_work, args=(left[:200], seed, base, journal))
        process.start()
        why = "dead"
        while process.is_alive():
            process.join(1)
            last = (_read(journal) or [{}])[-1]
            if "begun" in last and time.time() - last["at"] > SECONDS_BY_CLOCK:
                process.kill()
                process.join()
                why = "slow"
        last = (_read(journal) or [{}])[-1]
        if "begun" in last:
            kind, number = last["begun"]
            with journal.open("a") as file:
                file.write(
                    json.dumps({"kind": kind, "number": number, "outcome": why, "seconds": SECONDS_BY_CLOCK}) + "\n"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=2000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="folder for what is done; run again, it goes on")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    work = args.work or Path(tempfile.gettempdir()) / f"ultrafuser-fuzz-{args.seed}"
    base = work / "base"
    if not (base / "done").exists():
        shutil.rmtree(base, ignore_errors=True)
        build(base)
        (base / "done").touch()
    tasks = [(kind, number) for number in range(args.mutations) for kind in args.kinds]
    watchers = []
    # a thread would do, if forking beside threads were safe
    for k in range(args.workers):
        own = (tasks[k :: args.workers], args.seed, base, work / f"journal-{k}-of-{args.workers}.jsonl")
        watchers.append(get_context("fork").Process(target=_watched, args=own))
        watchers[-1].start()
    for watcher in watchers:
        watcher.join()
    lines = [line for k in range(args.workers) for line in _read(work / f"journal-{k}-of-{args.workers}.jsonl")]
    lines = [
        line for line in lines if "outcome" in line and line["kind"] in args.kinds and line["number"] < args.mutations
    ]
    counts = {
        kind: {o: sum(line["kind"] == kind and line["outcome"] == o for line in lines) for o in OUTCOMES}
        for kind in args.kinds
    }
    slowest = max((line["seconds"] for line in lines), default=0)
    result = {"seed": args.seed, "mutations": args.mutations, "slowest_seconds": slowest, "counts": counts}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    failures = [line for line in lines if line["outcome"] not in ("right", "words")]
    for line in failures[:50]:
        print(line["kind"], line["number"], line["outcome"], line.get("why", "")[-600:], file=sys.stderr)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
