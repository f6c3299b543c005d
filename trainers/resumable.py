"""Resuming to the bit, for every trainer of this package."""

import json
from pathlib import Path

from transformers.trainer_utils import TrainOutput

from .compat import end_without_training
from .stage_checkpoint import STATE_FILE, EndedError, checkpoint_to_resume, saved_state


class Resumable:
    """Lets a trainer with a sampler resume to the bit: a mixin, before TRL's trainer.

    A subclass defines `identity`, `progress`, `restore` and `_begin`. Its compatibility class calls `save_stage`.
    """

    def identity(self) -> dict:
        """Returns what must be the same in a checkpoint for a run to resume from it."""
        return {
            "stage": self.stage,
            "domains": self.domains,
            "sizes": self.sizes.tolist(),
            "batch_size": self.sampler.batch_size,
            "seed": self.args.seed,
            "mixed_share": self.args.mixed_share,
        }

    def progress(self) -> dict:
        """Returns what a resumed run needs beside weights, optimizer and random states. Every process calls it."""
        raise NotImplementedError

    def restore(self, state: dict) -> None:
        """Restores what `progress` returned."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains as `Trainer.train` does. A stage resumes from its own complete checkpoints only.

        A stage that had ended is returned as it was when it ended: `Trainer` would take one more step.

        Raises:
            ValueError: If there is no checkpoint to resume from, or it is of another run.
        """
        if self.sampler.batches_drawn:
            self._begin()
        checkpoint = checkpoint_to_resume(self, resume_from_checkpoint)
        if checkpoint:
            self.restore(saved_state(self, checkpoint))
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except EndedError:
            end_without_training(self)
            return TrainOutput(self.state.global_step, 0.0, {})

    def save_stage(self, folder: str) -> None:
        """Writes the stage's state into a checkpoint, before `Trainer` deletes old checkpoints."""
        progress = self.progress()
        if self.args.should_save:
            (Path(folder) / STATE_FILE).write_text(json.dumps({**self.identity(), **progress}))
        # what every process wrote is there before the file that makes a checkpoint complete
        self.accelerator.wait_for_everyone()
