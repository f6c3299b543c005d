"""Commands that train gates and fused models, and one model from a fused one."""

import os
import re
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..plain import Console, echo
from ..strategies import CANDIDATES, GATE_HELP, ROUTER_HELP
from .arguments import Examples, HeldOutData, MaxLength, Model, Out, PromptTokens, named
from .group import Group


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
    stage: Annotated[str | None, Option(help="gate, joint or single. Default: what the recipe says.")] = None,
    model: Annotated[
        str | None, Option(help="Folder of a fused model, or of any model for stage single; or an id on the Hub.")
    ] = None,
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

    Stage single trains one model that is not fused, on domains whose mix is learned: Mixture-of-Skills.

    Example: ultrafuser train --stage gate --model fused --data text=text.jsonl --data code=code.jsonl --out trained --learning-rate 1e-3
    """
    from ..train import stage_recipe

    fused, args, model_args = _stage(stage, words, model, data, out, max_steps)
    _resume(args, resume)
    stage_recipe.train(fused, args, model_args)
    worth = f" Is it worth it? `ultrafuser evaluate {args.output_dir} --help`."
    echo(f"Wrote {args.output_dir!r}.{'' if fused.stage == 'single' else worth}")


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


@group.command(context_settings={"ignore_unknown_options": True})
def distil(
    words: Annotated[
        list[str] | None,
        Argument(metavar="RECIPE --FIELD VALUE", help="YAML file; any field of `DistilConfig` as an option."),
    ] = None,
    model: Annotated[str | None, Option(help="Folder of the fused model that teaches, or its id on the Hub.")] = None,
    student: Annotated[
        str | None,
        Option(help="Name of one of its specialists, or folder or Hub id of any model of the same tokenizer."),
    ] = None,
    data: Annotated[list[str] | None, Option(help="As for `ultrafuser train`. Rows may be prompts alone.")] = None,
    out: Annotated[Path | None, Option(help="Folder to write.")] = None,
    max_steps: Annotated[int | None, Option(help="Optimizer steps.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
) -> None:
    """Distil a fused model into one ordinary model, which any engine runs. The student writes its own answers.

    With --off-policy true it learns on the answers in the rows.

    Example: ultrafuser distil --model fused --student text --data text=text.jsonl --data code=code.jsonl --out small
    """
    from ..train import distil_recipe

    words, recipe = _begun(words)
    given = {"model_name_or_path": model, "student": student, "output_dir": out, "max_steps": max_steps}
    chosen, args = distil_recipe.parse([*_options(given), *words], recipe)
    _set_domains(chosen, data)
    _resume(args, resume)
    distil_recipe.distil(chosen, args)
    echo(f"Wrote {args.output_dir!r}, a model that needs no code of this package. Its card says how it was made.")


@group.command(extra="eval")
def route(
    model: Model,
    data: HeldOutData,
    out: Out,
    kind: Annotated[str, Option(help=f"{ROUTER_HELP} That by perplexity needs no training.")] = "words",
    examples: Examples = 200,
    max_length: MaxLength = 1024,
    prompt_tokens: PromptTokens = 32,
) -> None:
    """Train a router: from a prompt to weights of the specialists, by which of them answers such prompts best.

    Example: ultrafuser route fused --data text=text.jsonl --data code=code.jsonl --out router
    """
    from ..route import router_training

    limits = {"examples": examples, "max_length": max_length, "prompt_tokens": prompt_tokens}
    share = router_training.train(model, named(data, "--data"), out, kind, **limits)
    echo(
        f"Wrote {str(out)!r}, which chooses the best specialist for {share:.0%} of the prompts that it learned from. To use it: "
        f"`ultrafuser chat {model} --router {out}`, and with --alone only that specialist answers."
    )


def _begun(words: list[str] | None) -> tuple[list[str], Path | None]:
    """Prepares for training, and splits a recipe from the options that are not ours, which come as words, too."""
    # its loaders fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = list(words or [])
    recipe = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    return words, recipe


def _options(given: dict) -> list[str]:
    return [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]


def _set_domains(chosen, data: list[str] | None) -> None:
    """Sets the domains' sources from --data."""
    from .. import source_names

    if data and len(data) == 1 and "=" not in data[0] and re.search(r"/|\.jsonl?(\.gz)?$", data[0]):
        chosen.domains = source_names.load_arguments(data[0])
    elif data:
        chosen.domains = {d: source_names.load_arguments(source) for d, source in named(data, "--data").items()}


def _resume(args, resume: bool) -> None:
    """Sets the checkpoint to go on from, and says which."""
    from trainers.stage_checkpoint import last_complete_checkpoint

    if resume:
        args.resume_from_checkpoint = last_complete_checkpoint(args.output_dir)
        echo(f"Going on from {args.resume_from_checkpoint or 'the beginning: there is no checkpoint'}.")


def _stage(stage: str | None, words: list[str] | None, model, data: list[str] | None, out, max_steps):
    """Parses what to train, and how, from a command line."""
    from ..train import stage_recipe

    words, recipe = _begun(words)
    given = {"model_name_or_path": model, "output_dir": out, "max_steps": max_steps}
    fused, args, model_args = stage_recipe.parse([*_options(given), *words], stage=stage, recipe=recipe)
    _set_domains(fused, data)
    return fused, args, model_args
