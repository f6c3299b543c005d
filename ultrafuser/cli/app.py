"""Puts the groups of commands together, and ends a run as a user expects."""

import _thread
import signal
import sys
import threading
import warnings
from importlib import metadata
from typing import Annotated

import typer

from ..plain import echo, plain
from . import build, data, evaluate, hub, merge, serve, train


INTERRUPTED = 130  # the status of what Ctrl-C ended
# panels of `ultrafuser --help`, in the order in which one needs them
GROUPS = (
    build.group,
    merge.group,
    train.group,
    evaluate.group,
    serve.group,
    hub.group,
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for group in GROUPS:
    app.add_typer(group)
app.add_typer(data.group, name="data", help=data.HELP, rich_help_panel=data.group.title)


def _tell_version(asked: bool) -> None:
    if asked:
        echo(metadata.version("ultrafuser"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fuse several specialist language models into one, token by token."""


def main() -> None:
    """Entry point of the console script."""
    sys.unraisablehook = _interrupted_again
    warnings.formatwarning = _told
    try:
        try:
            app()
        except KeyboardInterrupt as interrupted:
            # before the command line is read
            raise SystemExit(INTERRUPTED) from interrupted
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            echo("Stopped. What was finished is kept.", err=True)
        raise
    finally:
        # all is done, or cleaned up: from here on Ctrl-C has nothing to tell
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _told(message: Warning | str, category: type[Warning], *place) -> str:
    """Returns a warning as a user reads it: its sentence, without the line of code that it came from."""
    return f"{'Warning' if category is UserWarning else category.__name__}: {plain(message)}\n"


def _interrupted_again(unraisable) -> None:
    """Interrupts once more where Ctrl-C came while Python cleared something away, which cannot be interrupted."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # a moment later, as this is a part of the clearing
        threading.Timer(0.01, _thread.interrupt_main).start()
