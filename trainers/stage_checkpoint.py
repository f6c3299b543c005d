"""The state of a stage in its checkpoints, and the checks before it resumes from one."""

import json
import os
from pathlib import Path

from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME


STATE_FILE = "ultrafuser_stage.json"


class EndedError(Exception):
    """Raised if a resumed stage has no step left."""


def has_stopped(stopping: EarlyStoppingCallback | None) -> bool:
    """Returns whether a stage ended early, because its held-out loss no longer fell."""
    return stopping is not None and stopping.early_stopping_patience_counter >= stopping.early_stopping_patience


def saved_state(trainer, checkpoint: str | os.PathLike) -> dict:
    """Returns the state that `Resumable.save_stage` wrote.

    Raises:
        ValueError: If it is another trainer's checkpoint, or another run's.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.exists():
        refuse_model_alone(path.parent, type(trainer).__name__)
        raise ValueError(
            f"A stage resumes from a checkpoint that it wrote itself, but {str(checkpoint)!r} has no {STATE_FILE}: "
            f"it is another trainer's, or was cut off while being written. Choose another one, or start a new run "
            f"from its model."
        )
    # what checkpoints of before there were mixed examples and samplers do not have
    state = {"mixed_share": 0.0, "sampler": "stratified", **json.loads(path.read_text())}
    for key, own in trainer.identity().items():
        if state.get(key) != own:
            raise ValueError(
                f"A stage resumes what it began, because optimizer, schedule and draws belong together, but {key} "
                f"is {state[key]!r} in {str(checkpoint)!r} and {own!r} here. Start a new run from its model: "
                f"{type(trainer).__name__}({str(checkpoint)!r}, ...)."
            )
    return state


def checkpoint_to_resume(trainer, chosen: str | bool | None) -> str | None:
    """Returns the checkpoint to resume from, or None to begin anew.

    Args:
        trainer: The stage.
        chosen: As for `Trainer.train`: True takes the last complete checkpoint in the output folder.

    Raises:
        ValueError: If there is none.
    """
    if chosen is not True:
        return chosen or None
    folder = trainer.args.output_dir
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        for unusable in Path(folder).glob("checkpoint-*"):
            refuse_model_alone(unusable, type(trainer).__name__)
        raise ValueError(
            f"There is no complete checkpoint of a stage to resume from in {folder!r}. Check the folder, or begin anew "
            f"with `train()`."
        )
    return checkpoint


def refuse_model_alone(checkpoint: Path, trainer_name: str) -> None:
    """Raises a ValueError where a checkpoint holds the model and no state of the optimizer."""
    # torch, FSDP and DeepSpeed call the optimizer's state differently
    state = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]
    if (checkpoint / TRAINER_STATE_NAME).exists() and not state:
        raise ValueError(
            f"A stage goes on with the state of its optimizer, but {str(checkpoint)!r} holds the model alone, as "
            f"`save_only_model=True` asks for. Start a new run from its model: {trainer_name}"
            f"({str(checkpoint)!r}, ...)."
        )


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Returns the last checkpoint of a stage that was written completely, or None if there is none."""
    found = [p.parent for p in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    for checkpoint in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            # `Trainer` writes it last
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
            return str(checkpoint)
        except (OSError, json.JSONDecodeError):
            continue
    return None
