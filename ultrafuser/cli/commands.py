"""Commands that make, change and use fused folders."""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..plain import echo
from ..strategies import CANDIDATES, DEFAULT_GATE, FUSION_HELP, GATE_HELP, SPARSIFIER_HELP


app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="Folder of a fused model.")]
Out = Annotated[Path, typer.Option(help="Folder to write; there must be nothing in it.")]
# of servers
Host = Annotated[str, typer.Option(help="Address to listen on.")]
AllowHost = Annotated[
    list[str] | None, typer.Option(help="Further name under which the server may be asked for; may be given again.")
]
AllowOrigin = Annotated[
    list[str] | None, typer.Option(help="Web page that may ask, https://example.org; may be given again.")
]
KeyVariable = Annotated[str, typer.Option(help="Environment variable of the key that clients must send.")]
WithoutKey = Annotated[bool, typer.Option("--without-key", help="Let others than this machine ask without a key.")]
KEY_VARIABLE = "ULTRAFUSER_KEY"


@app.command()
def fuse(
    what: Annotated[list[str], typer.Argument(help="NAME=ID or NAME=FOLDER of each specialist; or one YAML recipe.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; there must be nothing in it.")] = None,
    gate: Annotated[str | None, typer.Option(help=f"{GATE_HELP} Default: {DEFAULT_GATE}.")] = None,
    fusion: Annotated[str | None, typer.Option(help=f"{FUSION_HELP} Default: logits.")] = None,
    gate_sparsifier: Annotated[str | None, typer.Option(help=f"{SPARSIFIER_HELP} Default: none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, bfloat16 say. Default: what they share.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Name of the specialist whose chat template to take.")
    ] = None,
    revision: Annotated[list[str] | None, typer.Option(help="NAME=COMMIT, branch or tag; may be given again.")] = None,
    base: Annotated[str | None, typer.Option(help="Of adapters, if it is not where they say.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its sizes; load no weights.")] = False,
) -> None:
    """Fuse specialists into one model's folder. Its new gate weighs all alike: train it next.

    Example: ultrafuser fuse text=Qwen/Qwen2.5-1.5B-Instruct code=Qwen/Qwen2.5-Coder-1.5B-Instruct --out fused --chat-template text --dry-run
    """
    with _in_words():
        from ..build.recipes import read_recipe

        choices = {
            "specialist_revisions": pairs(revision or [], "--revision") or None,
            "base": base,
            "chat_template": chat_template,
            "gate": gate,
            "fusion": fusion,
            "gate_sparsifier": gate_sparsifier,
        }
        choices = {key: value for key, value in choices.items() if value is not None}
        by_name = len(what) > 1 or "=" in what[0]
        recipe = read_recipe(pairs(what, "Specialists") if by_name else Path(what[0])).choose(choices, dtype)
        if dry_run:
            from ..check.render import show

            judgement = recipe.plan()
            show(judgement, _console())
            raise typer.Exit(2 if judgement.verdict == "blocks" else 0)
        out = out or recipe.out
        if out is None:
            raise typer.BadParameter("say which folder to write: --out, or `out` in the recipe.")
        recipe.build(out, say=echo)
    echo(f"Wrote {str(out)!r}. To load it:\n\n{_loading(out)}")


def _loading(out: Path | str, revision: str | None = None) -> str:
    of = f'"{out}", revision="{revision}"' if revision else f'"{out}"'
    return "\n".join(
        f"{variable} = {auto}.from_pretrained({of}, trust_remote_code=True)"
        for variable, auto in (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))
    )


@app.command()
def refer(
    folder: Folder,
    out: Out,
    specialists: Annotated[
        list[str] | None, typer.Option(help="NAME=ID, NAME=ID@COMMIT or NAME=FOLDER, if the folder does not say.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of adapters, if it is not where they say.")] = None,
) -> None:
    """Write a fused model without its specialists: the gate, and where they are. `ultrafuser fuse` makes it whole again.

    Example: ultrafuser refer fused --out refs && ultrafuser fuse refs/refs.yaml --out fused-again
    """
    with _in_words():
        from ..build import reference

        reference.refer(folder, out, specialists=specialists, base=base, say=echo)
    size = sum(path.stat().st_size for path in out.iterdir())
    echo(
        f"Wrote {str(out)!r}, {size:,} bytes. To have the whole model again: ultrafuser fuse {out / reference.RECIPE} "
        f"--out FOLDER"
    )


@app.command()
def specialist(folder: Folder, name: Annotated[str, typer.Argument(help="Of the specialist.")], out: Out) -> None:
    """One specialist of a fused model back, as an ordinary model's folder with its tokenizer.

    Example: ultrafuser specialist fused code --out code-again
    """
    with _in_words():
        from ..build import specialist_edits

        specialist_edits.take_out(folder, name, out)
    echo(f"Wrote {str(out)!r}, which loads with AutoModelForCausalLM and needs no code of ours.")


@app.command()
def add(
    folder: Folder,
    newcomer: Annotated[str, typer.Argument(help="NAME=ID or NAME=FOLDER.")],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of its repository.")] = None,
) -> None:
    """Put one more specialist into a fused model; what the gate learned about the others stays.

    Example: ultrafuser add fused medicine=owner/medicine-1.5b --out fused-4
    """
    with _in_words():
        from ..build import specialist_edits

        [(name, source)] = pairs([newcomer], "The argument").items()
        specialist_edits.add(folder, name, source, out, revision=revision)
    echo(f"Wrote {str(out)!r}. Nothing has shown its gate yet when {name!r} is right: train it.")


@app.command()
def remove(folder: Folder, name: Annotated[str, typer.Argument(help="Of the specialist.")], out: Out) -> None:
    """Take a specialist out of a fused model; what the gate learned about the others stays.

    Example: ultrafuser remove fused math --out fused-2
    """
    with _in_words():
        from ..build import specialist_edits

        specialist_edits.remove(folder, name, out)
    echo(f"Wrote {str(out)!r}.")


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE --FIELD VALUE",
            help="YAML file, as those in examples/recipes; any field of one as an option.",
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="gate or joint. Default: what the recipe says.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a fused model, or its id on the Hub.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="DOMAIN=FILE.jsonl or DOMAIN=HUB_ID:SPLIT, once each; or one without DOMAIN=, with a column `domain`."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
) -> None:
    """Train a stage: first the gate, then, if you like, everything. Any field of a recipe is an option, too.

    Example: ultrafuser train --stage gate --model fused --data text=text.jsonl --data code=code.jsonl --out trained --learning_rate 1e-3
    """
    with _in_words():
        from ..train import stage_recipe

        fused, args, model_args = _stage(stage, words, model, data, out, max_steps)
        if resume:
            args.resume_from_checkpoint = stage_recipe.last_complete_checkpoint(args.output_dir)
            echo(f"Going on from {args.resume_from_checkpoint or 'the beginning: there is no checkpoint'}.")
        stage_recipe.train(fused, args, model_args)
    echo(f"Wrote {args.output_dir!r}. Is it worth it? `ultrafuser evaluate {args.output_dir} --help`.")


@app.command(context_settings={"ignore_unknown_options": True})
def gates(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE --FIELD VALUE", help="As for `ultrafuser train --stage gate`."),
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help=f"{GATE_HELP} Repeat it. Default: {', '.join(CANDIDATES)}.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a fused model, or its id on the Hub.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="As for `ultrafuser train`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the best one's model to.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps of each.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each is trained.")] = 1,
) -> None:
    """Which gate? Trains several on one pass of the specialists over the data, and measures them on rows held out.

    Example: ultrafuser gates --model fused --data text=text.jsonl --data code=code.jsonl --gate mlp:64 --gate linear --out gated
    """
    with _in_words():
        from ..plain import Console
        from ..train import gate_search as comparing

        fused, args, model_args = _stage("gate", words, model, data, out, max_steps)
        fits = comparing.compare(
            fused, args, model_args, gate or list(CANDIDATES), seeds=seeds, say=Console(stderr=True).print
        )
        _console().print(comparing.table(fits))
    echo(f"Wrote the model with the best one, {fits[0].gate!r}, to {str(out or args.output_dir)!r}.")


@app.command()
def speed(
    model: Annotated[str, typer.Argument(help="Folder of a fused model, or its id on the Hub.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Such as will be asked; several are one batch.")] = None,
    new_tokens: Annotated[int, typer.Option(min=8, help="Of each prompt.")] = 64,
    compile_steps: Annotated[bool, typer.Option("--compile", help="Also what compiles, which takes minutes.")] = False,
    assistant: Annotated[str | None, typer.Option(help="Small model of the same tokenizer, to draft.")] = None,
) -> None:
    """Measure every way of decoding on this machine, beside each specialist alone.

    Example: ultrafuser speed fused --prompt "def area(width, height):"
    """
    with _in_words():
        from ..fused_folders import open_fused
        from ..serve import decode_benchmark

        fused, tokenizer = open_fused(model)
        prompts = prompt or [decode_benchmark.PROMPT]
        alone, found = decode_benchmark.measure(
            fused, tokenizer, prompts, new_tokens=new_tokens, compile_steps=compile_steps, assistant=assistant
        )
        _console().print(decode_benchmark.table(fused, alone, found))
    for way, reason in found.left_out.items():
        echo(f"Not {way}: {reason}")
    echo(
        f"In Python, the fastest: model, options = ultrafuser.decoding.choosing.decoder(model, {found.fastest!r}); "
        f"model.generate(**inputs, **options)"
    )


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder of a fused model, or its id on the Hub.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    decoding: Annotated[str, typer.Option(help="plain; stacked; or auto: what is faster, by measurement.")] = "plain",
) -> None:
    """Chat in the terminal, every token coloured by the specialist that leads. Or pipe one prompt per line into it.

    Example: ultrafuser chat fused
    """
    with _in_words():
        from ..fused_folders import open_fused
        from ..serve.chat import Chat, typed
        from ..serve.decode_benchmark import for_chat

        console = _console()
        fused, tokenizer = open_fused(model)
        conversation = Chat(for_chat(fused, tokenizer, decoding), tokenizer, console, max_new_tokens=max_new_tokens)
        conversation.run(typed(console) if sys.stdin.isatty() else sys.stdin)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="Folder of a fused model, or its id on the Hub.")],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    key_variable: KeyVariable = KEY_VARIABLE,
    without_key: WithoutKey = False,
) -> None:
    """A web page to chat with a fused model, coloured by who speaks, with sliders that steer the gate.

    Example: ultrafuser demo fused --port 7860
    """
    with _in_words():
        from ..fused_folders import open_fused
        from ..serve import demo as web
        from ..serve.guard import host_names, key_for, run

        key = key_for(host, key_variable, without_key)
        name = Path(model).resolve().name if Path(model).exists() else model
        settings = {"hosts": host_names(host, allow_host or ()), "origins": allow_origin or (), "key": key}
        page = web.application(*open_fused(model), name, **settings)
        echo(f"Open http://{host}:{port}. End it with Ctrl-C.")
        run(page, host, port)


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made if it is not there.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who sees it. Default: its owner alone, if it is not there yet."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. Default: main.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before much is sent, or files are replaced.")] = False,
) -> None:
    """Upload a fused model with its code, tokenizer and card to the Hub, in one commit. Killed, run it again.

    Example: ultrafuser push fused me/text-code-math --private
    """

    def agree() -> bool:
        if yes or sys.stdin.isatty():
            return yes or typer.confirm("Push?")
        raise ValueError("This needs a yes, and there is nobody to ask. Add --yes.")

    with _in_words():
        from transformers.utils import logging

        from ..hub.upload import push as run

        # of the look at the weights, which is quick; what takes long is the upload
        logging.disable_progress_bar()
        commit = run(folder, repo, private=private, revision=revision, say=echo, agree=agree)
    if commit is None:
        echo("Nothing was sent.")
        raise typer.Exit(1)
    echo(f"{commit}\nTo load it:\n\n{_loading(repo, revision)}")


@app.command()
def serve(
    folder: Annotated[str, typer.Argument(help="Folder of a fused model: its name in requests.")],
    host: Host = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    key_variable: KeyVariable = KEY_VARIABLE,
    without_key: WithoutKey = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 and so on.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights. Default: as saved.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 and so on.")] = None,
    continuous_batching: Annotated[
        bool,
        typer.Option("--continuous-batching", help="One paged cache for all requests; sampling is the model's own."),
    ] = False,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="""JSON, variables of the chat template: '{"enable_thinking": false}'.""")
    ] = None,
) -> None:
    """Serve one fused model behind OpenAI's protocol, with transformers' handlers. Nobody can make it load another.

    Example: ultrafuser serve fused --port 8000
    """
    with _in_words():
        from ..serve.guard import host_names, key_for
        from ..serve.server import serve as run
        from ..serve.server import template_variables

        key = key_for(host, key_variable, without_key)
        variables = template_variables(chat_template_kwargs)
        loading = {"device_map": device, "dtype": dtype}
        if attn_implementation is not None:
            loading["attn_implementation"] = attn_implementation
        settings = {"hosts": host_names(host, allow_host or ()), "origins": allow_origin or ()}
        settings |= {"continuous_batching": continuous_batching, "template_variables": variables}
        run(folder, host, port, key, loading, **settings)


def _stage(stage: str | None, words: list[str] | None, model, data: list[str] | None, out, max_steps):
    """What to train, and how, from a command line."""
    from .. import row_files
    from ..train import stage_recipe

    # its loaders fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # TRL sets it by its old name, whatever one does
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    given = {"model_name_or_path": model, "output_dir": out, "max_steps": max_steps}
    arguments = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    words = list(words or [])
    # options that are not ours come as words, too
    recipe = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    fused, args, model_args = stage_recipe.parse([*arguments, *words], stage=stage, recipe=recipe)
    if data and len(data) == 1 and "=" not in data[0] and re.search(r"/|\.jsonl?(\.gz)?$", data[0]):
        fused.domains = row_files.arguments_of(data[0])
    elif data:
        fused.domains = {d: row_files.arguments_of(source) for d, source in pairs(data, "--data").items()}
    return fused, args, model_args


def pairs(texts: list[str], what: str) -> dict[str, str]:
    """NAME=VALUE arguments as a dict."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, value) in zip(texts, pairs, strict=True):
        if not name or not value:
            raise typer.BadParameter(f"{what} must be NAME=VALUE, but got {text!r}.")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{what} must have a name each, but the names are {names}.")
    return {name: value for name, _, value in pairs}


@contextmanager
def _in_words() -> Iterator[None]:
    """Bars only where somebody watches; errors as sentences, and exit code 2."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        disable_progress_bars()
        logging.disable_progress_bar()
    try:
        yield
    except ModuleNotFoundError:
        # `cli.main` says which extra brings it
        raise
    except (OSError, ValueError, ImportError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error


def _console():
    from ..plain import Console

    return Console()
