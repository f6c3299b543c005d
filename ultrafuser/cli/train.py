"""Commands that train gates and fused models."""

import os
import re
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..plain import Console, echo
from ..strategies import CANDIDATES, GATE_HELP
from .arguments import named
from .group import Group, hide_trl_warning


group = Group("Train")


@group.command(context_settings={"ignore_unknown_options": True})
def train(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="RECIPE --FIELD VALUE",
            help="YAML file, as those in examples/recipes; any field of one as an option.",
        ),
    ] = None,
    stage: Annotated[str | None, Option(help="gate or joint. Default: what the recipe says.")] = None,
    model: Annotated[str | None, Option(help="Folder of a fused model, or its id on the Hub.")] = None,
    data: Annotated[
        list[str] | None,
        Option(
            help="DOMAIN=FILE.jsonl or DOMAIN=HUB_ID:SPLIT, once each; or one without DOMAIN=, with a column `domain`."
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="Folder to write.")] = None,
    max_steps: Annotated[int | None, Option(help="Optimizer steps.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
) -> None:
    """Train a stage: first the gate, then, if you like, everything. Any field of a recipe is an option, too.

    Example: ultrafuser train --stage gate --model fused --data text=text.jsonl --data code=code.jsonl --out trained --learning-rate 1e-3
    """
    from ..train import stage_recipe

    fused, args, model_args = _stage(stage, words, model, data, out, max_steps)
    if resume:
        args.resume_from_checkpoint = stage_recipe.last_complete_checkpoint(args.output_dir)
        echo(f"Going on from {args.resume_from_checkpoint or 'the beginning: there is no checkpoint'}.")
    stage_recipe.train(fused, args, model_args)
    echo(f"Wrote {args.output_dir!r}. Is it worth it? `ultrafuser evaluate {args.output_dir} --help`.")


@group.command(context_settings={"ignore_unknown_options": True})
def gates(
    words: Annotated[
        list[str] | None, Argument(metavar="RECIPE --FIELD VALUE", help="As for `ultrafuser train --stage gate`.")
    ] = None,
    gate: Annotated[list[str] | None, Option(help=f"{GATE_HELP} Repeat it. Default: {', '.join(CANDIDATES)}.")] = None,
    model: Annotated[str | None, Option(help="Folder of a fused model, or its id on the Hub.")] = None,
    data: Annotated[list[str] | None, Option(help="As for `ultrafuser train`.")] = None,
    out: Annotated[Path | None, Option(help="Folder to write the best one's model to.")] = None,
    max_steps: Annotated[int | None, Option(help="Optimizer steps of each.")] = None,
    seeds: Annotated[int, Option(min=1, help="How often each is trained.")] = 1,
) -> None:
    """Train several gates on one pass of the specialists over the data, and measure them on held-out rows.

    Example: ultrafuser gates --model fused --data text=text.jsonl --data code=code.jsonl --gate mlp:64 --gate linear --out gated
    """
    from ..train import gate_search

    fused, args, model_args = _stage("gate", words, model, data, out, max_steps)
    fits = gate_search.compare_gates(
        fused, args, model_args, gate or list(CANDIDATES), seeds=seeds, say=Console(stderr=True).print
    )
    Console().print(gate_search.table(fits))
    echo(f"Wrote the model with the best one, {fits[0].gate!r}, to {str(out or args.output_dir)!r}.")


def _stage(stage: str | None, words: list[str] | None, model, data: list[str] | None, out, max_steps):
    """Parses what to train, and how, from a command line."""
    from .. import source_names
    from ..train import stage_recipe

    # its loaders fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hide_trl_warning()
    given = {"model_name_or_path": model, "output_dir": out, "max_steps": max_steps}
    arguments = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    words = list(words or [])
    # options that are not ours come as words, too
    recipe = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    fused, args, model_args = stage_recipe.parse([*arguments, *words], stage=stage, recipe=recipe)
    if data and len(data) == 1 and "=" not in data[0] and re.search(r"/|\.jsonl?(\.gz)?$", data[0]):
        fused.domains = source_names.load_arguments(data[0])
    elif data:
        fused.domains = {d: source_names.load_arguments(source) for d, source in named(data, "--data").items()}
    return fused, args, model_args
