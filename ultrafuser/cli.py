"""The command line: `ultrafuser --help`."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Instruction data: make it, clean it, take it in, look at it.")
app.add_typer(data, name="data")


@app.callback()
def _root() -> None:
    """Fuse several specialist language models into one, token by token."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("ultrafuser-quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")] = False,
) -> None:
    """Make three small specialists, fuse them, train both stages and show what came out. Offline, on the CPU.

    Example: ultrafuser quickstart --out /tmp/quickstart
    """
    if out.exists() and any(out.iterdir()) and not overwrite:
        typer.echo(
            f"Nothing is overwritten unasked, but {str(out)!r} is not empty. Use --out or --overwrite.", err=True
        )
        raise typer.Exit(2)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # bars for what takes long only: training
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    # TRL sets it by its old name, whatever one does
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    # heavy imports only once they are needed, so that --help answers at once
    from . import quickstart as module

    shutil.rmtree(out, ignore_errors=True)
    module.run(out, seed=seed)


def main() -> None:
    """Entry point of the console script."""
    app()
