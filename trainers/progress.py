"""Progress of long work: a bar where somebody watches, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback


EVERY = 30.0  # seconds between two lines


class Progress:
    """Counts the steps of long work, on the standard error stream.

    Args:
        title: What is done.
        total: Steps of it.
        done: Steps that were done before.
        every: Seconds between two lines, where there is no terminal.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, every: float = EVERY):
        self.title, self.total, self.first, self.done, self.every = title, total, done, done, every
        self.began = self.shown = time.monotonic()
        watched = sys.stderr.isatty()
        # even if TQDM_DISABLE takes away those of other libraries
        self.bar = tqdm(desc=title, total=total, initial=done, leave=False, disable=False) if watched else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, steps: int = 1) -> None:
        """Counts steps that are done."""
        self.done += steps
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(steps)
        elif now - self.shown >= self.every and self.done < self.total:
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            sys.stderr.write(f"{self.title}: {self.done} of {self.total}, about {left / 60:.0f} min left\n")
            sys.stderr.flush()
            self.shown = now

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()


class ProgressOfTraining(TrainerCallback):
    """Shows the progress of a trainer's steps in place of `ProgressCallback`.

    Args:
        title: What is trained.
    """

    def __init__(self, title: str):
        self.title, self.progress = title, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress = Progress(self.title, state.max_steps, done=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.add()

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()
