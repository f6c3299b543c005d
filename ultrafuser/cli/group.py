"""Groups of commands: one panel of `ultrafuser --help` each, and one way to report errors."""

import functools
import os
import sys
import warnings
from collections.abc import Callable

import typer

from ..compat import hide_import_warnings
from ..plain import echo


class Group(typer.Typer):
    """Commands of one panel, listed in the order of their definition.

    Args:
        title: Of the panel.
        extra: Extra of the package that its commands need.
    """

    def __init__(self, title: str, *, extra: str | None = None) -> None:
        super().__init__(no_args_is_help=True)
        self.title, self.extra = title, extra

    def command(self, name: str | None = None, *, extra: str | None = None, **settings) -> Callable:
        """Registers a function as a command whose errors are sentences; `extra` is as for the group."""
        register = super().command(name, rich_help_panel=self.title, **settings)
        return lambda function: register(reports_errors(function, extra or self.extra))


def reports_errors(function: Callable, extra: str | None) -> Callable:
    """Wraps a command: what the user can correct is printed without a traceback, and the exit code is 2."""

    @functools.wraps(function)
    def command(*args, **kwargs):
        hide_import_warnings()
        hide_old_names()
        # bars only where somebody watches
        if not sys.stderr.isatty():
            hide_bars()
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            raise
        except ModuleNotFoundError as error:
            way = f" Install it: pip install 'ultrafuser[{extra}]'" if extra else ""
            echo(f"This command needs {error.name!r}, which is not installed.{way}", err=True)
            raise typer.Exit(2) from error
        except (OSError, ValueError, ImportError) as error:
            echo(_sentence(error), err=True)
            raise typer.Exit(2) from error

    return command


def _sentence(error: Exception) -> Exception | str:
    """Returns the text of an error; that of the operating system names its file and no number."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return error
    if isinstance(error, FileNotFoundError):
        return f"There is no {str(error.filename)!r}. Check the spelling."
    return f"{str(error.filename)!r} cannot be read or written: {error.strerror}."


def hide_bars() -> None:
    """Switches all progress bars off."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    # libraries read these when they are imported; what is imported already is told
    if "transformers" in sys.modules:
        hide_loading_bars()


def hide_loading_bars() -> None:
    """Switches bars of loading weights off, which is quick; those of downloads stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def hide_old_names() -> None:
    """Hides that TRL and PEFT call gradient checkpointing by its old names, whatever the settings are."""
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated", FutureWarning)
