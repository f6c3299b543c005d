"""Checks that all trainers' settings share."""

import sys
from typing import Any, get_args

import torch
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations

from .compat import dict_settings


MOST_WORKERS = 1024
WORDS = ("dataset_text_field", "hub_model_id", "resume_from_checkpoint", "run_name")  # or true or false


class CheckedConfig:
    """Mixin for settings that extend TRL's: raises a `ValueError` that names the field, before anything is loaded."""

    def __getstate__(self):
        """Returns what is pickled beside every checkpoint: everything but tokens."""
        state = {k: None if k.endswith("_token") and isinstance(v, str) else v for k, v in self.__dict__.items()}
        tokens = ("token", "use_auth_token")
        return {
            k: {name: x for name, x in v.items() if name not in tokens} if isinstance(v, dict) else v
            for k, v in state.items()
        }

    def check_types(self, annotations: dict[str, Any]) -> None:
        """Rejects values of another type than these fields have: a recipe's values come as they stand there."""
        for name, kind in annotations.items():
            kinds = get_args(kind) or (kind,)
            if set(kinds) <= {str, int, float, bool, type(None)}:
                _check_type(name, getattr(self, name), (*kinds, int) if float in kinds else kinds)
        for name, value in vars(self).items():
            if name in WORDS and not isinstance(value, str | bool | None):
                raise ValueError(f"`{name}` must be a word, but is {str(value)[:100]!r}. Correct it.")
            if isinstance(value, int) and abs(value) >= 1 << 63:
                raise ValueError(f"`{name}` must be a number of 64 bits, but is {str(value)[:100]}... Correct it.")
        for name in (name for name in dict_settings(self) if name.endswith("_kwargs")):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(
                    f"`{name}` holds `name: value`, but is {str(getattr(self, name))[:100]!r}. Correct it."
                )

    def check_machine(self) -> None:
        """Rejects more processes than a machine has room for, and programs that are not installed."""
        if self.dataloader_num_workers > MOST_WORKERS:
            raise ValueError(
                f"Each of `dataloader_num_workers` is a process, so there may be {MOST_WORKERS} of them, but it is "
                f"{self.dataloader_num_workers}. Take about as many as the machine has cores."
            )
        installed = get_available_reporting_integrations()
        if odd := [name for name in self.report_to if name not in installed]:
            raise ValueError(
                f"`report_to` names programs that are installed, here {installed}, but also {str(odd[0])[:100]!r}. Install "
                f"it, or leave it out."
            )

    def check_schedule(self) -> None:
        """Rejects settings that the schedule does not take. The trainer makes it after all else is loaded."""
        optimizer = torch.optim.SGD([torch.zeros(1)])
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, self.lr_scheduler_kwargs)
        except Exception as error:
            raise ValueError(
                f"`lr_scheduler_kwargs` must hold what the schedule {str(self.lr_scheduler_type)!r} takes, but is "
                f"{str(self.lr_scheduler_kwargs)[:100]!r}: {' '.join(str(error).split())[:200]}. Correct it."
            ) from error


def _check_type(name: str, value, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        what = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"`{name}` must be {what}, but is {str(value)[:100]!r}. Correct it.")
    if float in kinds and value is not None and not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` must be a finite number, but is {str(value)[:100]!r}. Correct it.")
