"""Keeps answers and losses of one model in a folder block by block: what is there is not computed again."""

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from experiments.real.generating import answers
from experiments.real.measuring import example_losses
from ultrafuser.atomic import write_json
from ultrafuser.provenance import digest


class Asked:
    """Asks a model, which is loaded when something is missing.

    Args:
        folder: Where its answers and losses are kept. Another model has another folder.
        load: Returns the model, ready to generate.
        tokenizer: Its tokenizer.
        batch: Questions at a time.
    """

    def __init__(self, folder: Path, load: Callable, tokenizer, batch: int):
        self.folder, self.load, self.tokenizer, self.batch = folder, load, tokenizer, batch
        folder.mkdir(parents=True, exist_ok=True)
        # several runs share a specialist
        self.lock = FileLock(folder / ".lock", is_singleton=True)

    @cached_property
    def model(self):
        """Loads the model."""
        return self.load()

    def answers(self, name: str, questions: list[str], longest: int) -> list[str]:
        """Returns its answer to each question. Each block is kept once it is finished."""
        with self.lock:
            return self._answered(name, questions, longest)

    def _answered(self, name: str, questions: list[str], longest: int) -> list[str]:
        path, found = self._found(name, [questions, longest, self.batch])
        done = {int(i): reply for i, reply in found.get("replies", {}).items()}
        before, began = found.get("seconds", 0.0), time.process_time()

        def keep(replies: dict[int, str]) -> None:
            write_json(path, {"seconds": before + time.process_time() - began, "replies": replies})

        if len(done) < len(questions):
            return answers(
                self.model, self.tokenizer, questions, longest, self.batch, title=name, done=done, keep=keep
            )
        return [done[i] for i in range(len(questions))]

    def losses(self, name: str, rows: list[dict], *, prompts: bool = False) -> list[tuple[float, int]]:
        """Returns summed loss and number of tokens of each row's answer, or of its question."""
        with self.lock:
            path, found = self._found(f"loss {name}", [[row["messages"] for row in rows], prompts])
            if not found:
                model, began = self.model, time.process_time()
                losses = example_losses(model, self.tokenizer, rows, prompts=prompts)
                found = {"losses": losses, "seconds": time.process_time() - began}
                write_json(path, found)
        return [tuple(pair) for pair in found["losses"]]

    def seconds(self) -> float:
        """Adds up the processor time of all that is kept."""
        return sum(json.loads(path.read_text())["seconds"] for path in self.folder.glob("* [0-9a-f]*.json"))

    def _found(self, name: str, identity: list) -> tuple[Path, dict]:
        path = self.folder / f"{name} {digest(identity, 8)}.json"
        return path, json.loads(path.read_text()) if path.exists() else {}
