"""Commands that write a model's card and send the model to the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..plain import echo
from .arguments import Folder, loading_code, named
from .group import Group, hide_loading_bars


group = Group("Share")


@group.command()
def card(
    folder: Folder,
    results: Annotated[
        list[Path] | None,
        Option(help="results.json of evaluate or judge, or a task's file of bench; may be given again."),
    ] = None,
    specialists: Annotated[list[str] | None, Option(help="NAME=ID or NAME=FOLDER; may be given again.")] = None,
    data: Annotated[list[str] | None, Option(help="Data set that it was trained on; may be given again.")] = None,
    repo: Annotated[str | None, Option(help="Id that the model will have on the Hub.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a README.md of someone else's.")] = False,
) -> None:
    """Write a fused folder's README.md: how to load it, what it is made of, licences, evaluation.

    Example: ultrafuser card fused --results out/results.json --specialists text=Qwen/Qwen2.5-1.5B-Instruct
    """
    from ..hub.model_card import write_card

    warnings = write_card(
        folder,
        results=results or [],
        specialists=named(specialists, "--specialists"),
        data=data or [],
        repo=repo,
        overwrite=overwrite,
    )
    for warning in warnings:
        echo(f"Warning: {warning}", err=True)
    echo(f"Wrote {folder / 'README.md'}.")


@group.command()
def push(
    folder: Folder,
    repo: Annotated[str, Argument(help="owner/name on the Hub; made if it is not there.")],
    private: Annotated[
        bool | None,
        Option("--private/--public", help="Who sees it. Default: its owner alone, if it is not there yet."),
    ] = None,
    revision: Annotated[str | None, Option(help="Branch to push to. Default: main.")] = None,
    yes: Annotated[bool, Option("--yes", help="Do not ask before much is sent, or files are replaced.")] = False,
) -> None:
    """Upload a fused model with its code, tokenizer and card to the Hub, in one commit. If interrupted, run it again.

    Example: ultrafuser push fused me/text-code-math --private
    """

    def agree() -> bool:
        if yes or sys.stdin.isatty():
            return yes or typer.confirm("Push?")
        raise ValueError("Confirmation is required, but this is not an interactive terminal. Pass --yes.")

    from ..hub.upload import push as run

    # of the look at the weights, which is quick; what takes long is the upload
    hide_loading_bars()
    commit = run(folder, repo, private=private, revision=revision, say=echo, agree=agree)
    if commit is None:
        echo("Nothing was sent.")
        raise typer.Exit(1)
    # what was pushed, whatever is pushed there later
    echo(f"{commit}\nTo load it:\n\n{loading_code(repo, commit.rsplit('/', 1)[-1])}")


@group.command()
def skill(
    folder: Annotated[Path, Argument(help="Folder of skills that an agent reads: .claude/skills, .agents/skills.")],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace another version.")] = False,
) -> None:
    """Write instructions for coding agents, which come with this package: SKILL.md.

    Example: ultrafuser skill .claude/skills
    """
    from .. import skills
    from ..atomic import write_whole

    path = folder / "ultrafuser" / "SKILL.md"
    text = skills.text()
    if path.exists() and path.read_text(encoding="utf-8") != text and not overwrite:
        raise FileExistsError(f"{str(path)!r} is another version, or has been changed. Replace it with --overwrite.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    echo(f"Wrote {path}.")
