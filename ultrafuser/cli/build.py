"""Commands that build and change folders of fused models."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..plain import Console, echo
from ..strategies import DEFAULT_GATE, FUSION_HELP, GATE_HELP, SPARSIFIER_HELP
from .arguments import (
    Base,
    Examples,
    Folder,
    HeldOutData,
    Json,
    MaxLength,
    Out,
    PromptTokens,
    SignedWeights,
    SpecialistName,
    loading_code,
    named,
    numbers,
)
from .group import Group, hide_bars, hide_loading_bars


group = Group("Fuse")


@group.command()
def quickstart(
    out: Annotated[
        Path | None, Option(help="Folder to write. Default: ultrafuser-quickstart, or ultrafuser-real with --real.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of everything random.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the folder if it exists.")] = False,
    real: Annotated[
        bool, Option("--real", help="Fuse real specialists, which answer: the adapters that come with this package.")
    ] = False,
    base: Annotated[
        str | None,
        Option(help="With --real: folder, GGUF file or ID@COMMIT of their base. Default: SmolLM2-135M on the Hub."),
    ] = None,
) -> None:
    """Make three small specialists, fuse them, train both stages and show what came out. Offline, on the CPU.

    With --real the specialists are adapters of a real model, and the same command goes on where it was stopped.

    Example: ultrafuser quickstart --out /tmp/quickstart
    """
    if base is not None and not real:
        raise typer.BadParameter("--base is of the real quickstart: add --real.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if real:
        _quickstart_real(out or Path("ultrafuser-real"), {} if base is None else {"base": base}, seed, overwrite)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    # bars for what takes long only: training
    hide_bars()
    # heavy imports only once they are needed, so that --help answers at once
    from ..quickstart import toy

    toy.run(out or Path("ultrafuser-quickstart"), seed=seed, overwrite=overwrite)


def _quickstart_real(out: Path, base: dict[str, str], seed: int, overwrite: bool) -> None:
    # libraries read these when they are imported
    if any(map(os.path.exists, base.values())):
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    from ..quickstart import real

    # those of downloads stay
    hide_loading_bars()
    real.run(out, **base, seed=seed, overwrite=overwrite)


@group.command()
def check(
    specialists: Annotated[
        list[str], Argument(help="Folders or ids on the Hub, each ID, ID@REVISION or NAME=...; two or more.")
    ],
    dtype: Annotated[
        str, Option(help="dtype of the fused model. Default: the one that all specialists share.")
    ] = "auto",
    fusion: Annotated[str, Option(help=FUSION_HELP)] = "logits",
    gate: Annotated[str, Option(help=GATE_HELP)] = DEFAULT_GATE,
    gate_sparsifier: Annotated[str, Option(help=SPARSIFIER_HELP)] = "none",
    signed_weights: SignedWeights = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Do these models fit together, and what would fusing them take? Reads no weights. Exit status 2 if they do not.

    Example: ultrafuser check Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Coder-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct
    """
    from modeling_ultrafuser.signed_ultrafuser import in_order

    from ..check import checks, metadata, render

    hide_bars()
    found = metadata.parse(specialists)
    signed = in_order(numbers(signed_weights, "--signed-weights"), list(found))
    choices = {"fusion": fusion, "gate": gate, "gate_sparsifier": gate_sparsifier, "signed_weights": signed}
    judgement = checks.judge(found, dtype=dtype, base=base, **choices)
    if as_json:
        echo(json.dumps(render.as_dict(judgement), indent=1))
    else:
        render.show(judgement, Console())
    if judgement.verdict == checks.BLOCKS:
        raise typer.Exit(2)


@group.command()
def fuse(
    what: Annotated[list[str], Argument(help="NAME=ID or NAME=FOLDER of each specialist; or one YAML recipe.")],
    out: Annotated[Path | None, Option(help="Folder to write; it must be empty or not exist.")] = None,
    gate: Annotated[str | None, Option(help=f"{GATE_HELP} Default: {DEFAULT_GATE}.")] = None,
    fusion: Annotated[str | None, Option(help=f"{FUSION_HELP} Default: logits.")] = None,
    gate_sparsifier: Annotated[str | None, Option(help=f"{SPARSIFIER_HELP} Default: none.")] = None,
    signed_weights: SignedWeights = None,
    dtype: Annotated[
        str | None, Option(help="dtype of the weights, such as bfloat16. Default: the one that all specialists share.")
    ] = None,
    chat_template: Annotated[str | None, Option(help="Name of the specialist whose chat template to take.")] = None,
    revision: Annotated[list[str] | None, Option(help="NAME=COMMIT, branch or tag; may be given again.")] = None,
    base: Base = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and its sizes; load no weights.")] = False,
) -> None:
    """Fuse specialists into one model's folder. Its new gate weighs all alike: train it next.

    Example: ultrafuser fuse text=Qwen/Qwen2.5-1.5B-Instruct code=Qwen/Qwen2.5-Coder-1.5B-Instruct --out fused --chat-template text --dry-run
    """
    from ..build.reference import read_recipe

    choices = {
        "specialist_revisions": named(revision, "--revision") or None,
        "base": base,
        "chat_template": chat_template,
        "gate": gate,
        "fusion": fusion,
        "gate_sparsifier": gate_sparsifier,
        "signed_weights": numbers(signed_weights, "--signed-weights"),
    }
    choices = {key: value for key, value in choices.items() if value is not None}
    by_name = len(what) > 1 or "=" in what[0]
    recipe = read_recipe(named(what, "Specialists") if by_name else Path(what[0])).choose(choices, dtype)
    if dry_run:
        from ..check.render import show

        judgement = recipe.plan()
        show(judgement, Console())
        raise typer.Exit(2 if judgement.verdict == "blocks" else 0)
    out = out or recipe.out
    if out is None:
        raise typer.BadParameter("say which folder to write: --out, or `out` in the recipe.")
    recipe.build(out, say=echo)
    echo(f"Wrote {str(out)!r}. To load it:\n\n{loading_code(out)}")


@group.command()
def compress(
    specialists: Annotated[
        list[str], Argument(help="NAME=ID, NAME=ID@REVISION or NAME=FOLDER of each full model, tuned from one base.")
    ],
    base: Annotated[str, Option(help="Base that all were tuned from: ID, ID@REVISION or folder.")],
    out: Annotated[Path, Option(help="Folder to write: the base, and an adapter for each. Run again, it goes on.")],
    rank: Annotated[int | None, Option(help="Highest rank of a layer's change.")] = None,
    error: Annotated[
        float | None, Option(help="Largest relative error of a layer's change; the least rank that meets it is taken.")
    ] = None,
    shared: Annotated[str, Option(help="base or mean: the weights that adapters are added to.")] = "base",
    data: Annotated[
        list[str] | None, Option(help="NAME=FILE.jsonl or NAME=HUB_ID:SPLIT, held-out data of a specialist.")
    ] = None,
) -> None:
    """Compress full models that were tuned from one base into LoRA specialists of it, to be fused in one base's memory.

    Example: ultrafuser compress text=text-1.5b code=code-1.5b math=math-1.5b --base base-1.5b --rank 64 --out small
    """
    from ..compress.compressing import BASE, Compression
    from ..compress.factors import Limits
    from ..compress.gain import losses, read_data, table, warning

    hide_loading_bars()
    compression = Compression(specialists, base, Limits(rank, error), shared)
    held = read_data(compression, named(data, "--data"))
    reports = compression.run(out, say=echo)
    measured = losses(compression, out, held)
    if (text := warning(measured)) is not None:
        echo(text)
    Console().print(table(reports, measured))
    if error is not None and (above := compression.above(reports)):
        echo(f"At rank {rank} the error of {above} layers is above {error}.")
    # a fused model has at least two specialists, and the base may be one
    pairs = " ".join(f"{name}={out / name}" for name in (*reports, *([BASE] if len(reports) == 1 else [])))
    echo(f"Wrote {str(out)!r}. To fuse them: ultrafuser fuse {pairs} --out FOLDER")


@group.command()
def add(
    folder: Folder,
    newcomer: Annotated[str, Argument(help="NAME=ID or NAME=FOLDER.")],
    out: Out,
    revision: Annotated[str | None, Option(help="Commit, branch or tag of its repository.")] = None,
) -> None:
    """Put one more specialist into a fused model; what the gate learned about the others stays.

    Example: ultrafuser add fused medicine=owner/medicine-1.5b --out fused-4
    """
    from ..build import specialist_edits

    [(name, source)] = named([newcomer], "The argument").items()
    specialist_edits.add(folder, name, source, out, revision=revision)
    echo(f"Wrote {str(out)!r}. The gate has not been trained on {name!r} yet: train it.")


@group.command()
def remove(folder: Folder, name: SpecialistName, out: Out) -> None:
    """Take a specialist out of a fused model; what the gate learned about the others stays.

    Example: ultrafuser remove fused math --out fused-2
    """
    from ..build import specialist_edits

    specialist_edits.remove(folder, name, out)
    echo(f"Wrote {str(out)!r}.")


@group.command()
def prune(
    folder: Folder,
    keep: Annotated[int, Option(help="Number of specialists to keep.")],
    data: HeldOutData,
    out: Out,
    examples: Examples = 200,
    max_length: MaxLength = 1024,
    prompt_tokens: PromptTokens = 32,
    by: Annotated[
        str, Option(help="loss; or distance from what all predict together, for text that nobody should learn from.")
    ] = "loss",
) -> None:
    """Keep the specialists that predict held-out text best without the others: all subsets of this size are measured.

    Example: ultrafuser prune fused --keep 2 --data text=text.jsonl --data code=code.jsonl --out fused-2
    """
    from ..build import pruning

    hide_loading_bars()
    limits = {"examples": examples, "max_length": max_length, "prompt_tokens": prompt_tokens, "by": by}
    subsets = pruning.prune(folder, keep, named(data, "--data"), out, **limits)
    Console().print(pruning.table(subsets, by))
    lost = " A gate that reads all specialists side by side lost a part of its input: train it again."
    echo(f"Wrote {str(out)!r}.{lost if len(subsets) > 1 else ' All specialists are kept, so that it is a copy.'}")


@group.command()
def pick(
    pool: Annotated[
        list[str], Argument(help="Folders or ids on the Hub, each ID, ID@REVISION or NAME=...; as many as you like.")
    ],
    keep: Annotated[int, Option(help="Number of specialists to pick.")],
    data: HeldOutData,
    out: Annotated[Path, Option(help="Folder for what each specialist predicts. Run again, it goes on.")],
    dtype: Annotated[str, Option(help="dtype of the weights. Default: the one that all specialists share.")] = "auto",
    examples: Examples = 200,
    max_length: MaxLength = 1024,
    prompt_tokens: PromptTokens = 32,
) -> None:
    """Pick the specialists to fuse from a pool of more than fit into memory: each is read once, one after another.

    Example: ultrafuser pick pool/a pool/b pool/c --keep 2 --data text=text.jsonl --data code=code.jsonl --out picked
    """
    from ..build import picking
    from ..check import metadata

    hide_loading_bars()
    settings = {"dtype": dtype, "examples": examples, "max_length": max_length, "prompt_tokens": prompt_tokens}
    places = metadata.parse(pool)
    picks = picking.pick(places, keep, named(data, "--data"), out, **settings, say=echo)
    Console().print(picking.table(picks))
    chosen = {one.name: places[one.name] for one in picks if one.picked}
    words = [f"{name}={location}" for name, (location, _) in chosen.items()]
    words += [f"--revision={name}={revision}" for name, (_, revision) in chosen.items() if revision]
    echo(f"To fuse them:\n\nultrafuser fuse {shlex.join(words)} --out FOLDER")


@group.command()
def specialist(folder: Folder, name: SpecialistName, out: Out) -> None:
    """One specialist of a fused model back, as an ordinary model's folder with its tokenizer.

    Example: ultrafuser specialist fused code --out code-again
    """
    from ..build import specialist_edits

    specialist_edits.take_out(folder, name, out)
    echo(f"Wrote {str(out)!r}, which loads with AutoModelForCausalLM and needs no code of ours.")


@group.command()
def refer(
    folder: Folder,
    out: Out,
    specialists: Annotated[
        list[str] | None, Option(help="NAME=ID, NAME=ID@COMMIT or NAME=FOLDER, if the folder does not say.")
    ] = None,
    base: Base = None,
) -> None:
    """Write a fused model without its specialists: the gate, and where they are. `ultrafuser fuse` makes it whole again.

    Example: ultrafuser refer fused --out refs && ultrafuser fuse refs/refs.yaml --out fused-again
    """
    from ..build import reference

    reference.refer(folder, out, specialists=specialists, base=base, say=echo)
    size = sum(path.stat().st_size for path in out.iterdir())
    echo(
        f"Wrote {str(out)!r}, {size:,} bytes. To have the whole model again: ultrafuser fuse {out / reference.RECIPE} "
        f"--out FOLDER"
    )
