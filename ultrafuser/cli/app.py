"""The command line: `ultrafuser --help`."""

import _thread
import json
import os
import signal
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..plain import echo
from ..strategies import DEFAULT_GATE, FUSION_HELP, GATE_HELP
from .commands import app as commands
from .commands import pairs
from .data import app as data_commands


INTERRUPTED = 130  # the status of what Ctrl-C ended

# of the package, by the command that needs it
EXTRAS = {
    "evaluate": "eval",
    "judge": "eval",
    "report": "eval",
    "bench": "eval",
    "data": "data",
    "serve": "serve",
    "demo": "demo",
}

# as one needs them
ORDER = (
    *(
        "quickstart",
        "check",
        "fuse",
        "train",
        "gates",
        "explain",
        "chat",
        "speed",
        "evaluate",
        "report",
        "bench",
        "judge",
    ),
    *("card", "push", "refer", "serve", "demo", "specialist", "add", "remove", "data"),
)


class _InOrder(typer.core.TyperGroup):
    def list_commands(self, context) -> list[str]:
        return sorted(super().list_commands(context), key=ORDER.index)


app = typer.Typer(cls=_InOrder, no_args_is_help=True, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Instruction data: make it, clean it, take it in, look at it.")
data.add_typer(data_commands)
app.add_typer(data, name="data")
app.add_typer(commands)


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
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # bars for what takes long only: training
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    # TRL sets it by its old name, whatever one does
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    # heavy imports only once they are needed, so that --help answers at once
    from ..toy import quickstart as module

    try:
        module.run(out, seed=seed, overwrite=overwrite)
    except OSError as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error


@app.command()
def check(
    specialists: Annotated[
        list[str], typer.Argument(help="Folders or ids on the Hub, each ID, ID@REVISION or NAME=...; two or more.")
    ],
    dtype: Annotated[str, typer.Option(help="Of the fused model. Default: what all specialists share.")] = "auto",
    fusion: Annotated[str, typer.Option(help=FUSION_HELP)] = "logits",
    gate: Annotated[str, typer.Option(help=GATE_HELP)] = DEFAULT_GATE,
    base: Annotated[str | None, typer.Option(help="Of adapters, if it is not where they say.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything in JSON, for programs.")] = False,
) -> None:
    """Do these models fit together, and what would fusing them take? Reads no weights. Exit status 2 if they do not.

    Example: ultrafuser check Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Coder-7B-Instruct Qwen/Qwen2.5-Math-7B-Instruct
    """
    from huggingface_hub.utils import disable_progress_bars

    from ..check import checks, findings, metadata, render
    from ..plain import Console

    disable_progress_bars()
    try:
        judgement = checks.judge(metadata.parse(specialists), dtype=dtype, fusion=fusion, gate=gate, base=base)
    except ValueError as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    if as_json:
        echo(json.dumps(render.as_dict(judgement), indent=1))
    else:
        render.show(judgement, Console())
    if judgement.verdict == findings.BLOCKS:
        raise typer.Exit(2)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a fused model, or its id on the Hub.")],
    data: Annotated[list[str], typer.Option(help="DOMAIN=FILE.jsonl or DOMAIN=HUB_ID:SPLIT, once per domain.")],
    out: Annotated[Path, typer.Option(help="Folder for the results. Run again, it goes on.")],
    tune: Annotated[list[str] | None, typer.Option(help="DOMAIN=..., other data to tune baselines with.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of a further model to compare with.")] = None,
    specialists_of: Annotated[
        str | None, typer.Option(help="Fused model from before stage two, whose specialists are untouched.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="What the specialists were tuned from, for merges.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Of each domain at most.")] = 200,
    max_length: Annotated[int, typer.Option(min=2, help="Longer examples are cut, in tokens.")] = 1024,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of plain text: what routers read.")] = 32,
    seed: Annotated[int, typer.Option(help="Of controls and resampling.")] = 0,
) -> None:
    """Is fusing worth it? A fused model against its specialists, averages, routers and merges: one table.

    Example: ultrafuser evaluate fused --data text=text.jsonl --data code=code.jsonl --out evaluated
    """
    from transformers.utils import logging

    from ..evaluation import evaluation_run
    from ..plain import Console

    logging.disable_progress_bar()
    try:
        results = evaluation_run.evaluate(
            model,
            pairs(data, "--data"),
            out,
            tune=pairs(tune or [], "--tune"),
            specialists_of=specialists_of,
            base=base,
            also=pairs(also or [], "--also"),
            examples=examples,
            max_length=max_length,
            prompt_tokens=prompt_tokens,
            seed=seed,
        )
    except (OSError, ValueError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    console = Console()
    console.print(
        *evaluation_run.tables(results), evaluation_run.verdict(results), *evaluation_run.left_out(results), sep="\n"
    )


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a fused model.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="results.json of evaluate or judge; may be given again.")
    ] = None,
    specialists: Annotated[list[str] | None, typer.Option(help="name=id or name=folder; may be given again.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="What it was trained on; may be given again.")] = None,
    repo: Annotated[str | None, typer.Option(help="Id that the model will have on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md of someone else's.")] = False,
) -> None:
    """Write a fused folder's README.md: how to load it, what it is made of, licences, evaluation.

    Example: ultrafuser card fused --results out/results.json --specialists text=Qwen/Qwen2.5-1.5B-Instruct
    """
    from ..hub.model_card import write_card

    sources = dict(s.partition("=")[::2] for s in specialists or [])
    try:
        warnings = write_card(
            folder, results=results or [], specialists=sources, data=data or [], repo=repo, overwrite=overwrite
        )
    except (ValueError, OSError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    for warning in warnings:
        echo(f"Warning: {warning}", err=True)
    echo(f"Wrote {folder / 'README.md'}.")


@app.command()
def judge(
    model: Annotated[str, typer.Argument(help="Folder of the model, or with --url its name on that server.")],
    questions: Annotated[str, typer.Option(help="JSON Lines file, or alpaca_eval, alpaca_eval_2, mt_bench.")],
    judge: Annotated[str, typer.Option(help="Name of the judging model on its server.")],
    out: Annotated[Path, typer.Option(help="Folder for answers, judgements and results.json.")],
    judge_url: Annotated[str, typer.Option(help="OpenAI-compatible server.")] = "https://api.openai.com/v1",
    judge_key_variable: Annotated[str | None, typer.Option(help="Environment variable of its API key.")] = None,
    judge_options: Annotated[str, typer.Option(help="More fields of its requests, as JSON.")] = '{"temperature": 0}',
    url: Annotated[str | None, typer.Option(help="Server that serves the model, such as vLLM's.")] = None,
    key_variable: Annotated[str | None, typer.Option(help="Environment variable of that server's API key.")] = None,
    method: Annotated[str | None, typer.Option(help="pairwise or grading; needed for a file.")] = None,
    against: Annotated[Path | None, typer.Option(help="answers.jsonl of another run to compare with.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub's data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many questions.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder of judge prompts other than the package's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at once, from a folder.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    retries: Annotated[int, typer.Option(min=0, help="Of a request, with back-off.")] = 6,
    timeout: Annotated[float, typer.Option(min=0, help="Of a request, in seconds.")] = 300.0,
) -> None:
    """Have another model compare (AlpacaEval) or grade (MT-Bench) a model's answers. Run again, it goes on.

    Example: ultrafuser judge fused --questions mt_bench --judge gpt-4.1 --out judged
    """
    from ..evaluation import judgements
    from ..evaluation.endpoint import Endpoint, EndpointError
    from ..keys import described
    from ..plain import Console

    try:
        options = dict(json.loads(judge_options))
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(f"an object in JSON was expected, but got {judge_options!r}.") from error
    shared = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    try:
        judging_by = Endpoint(judge, judge_url, judge_key_variable, options, **shared)
        answering = Endpoint(model, url, key_variable, **shared) if url else model
        for endpoint in (judging_by, answering) if url else (judging_by,):
            echo(f"Asked: {endpoint.model!r} at {described(endpoint.url, endpoint.variable)}.", err=True)
        results = judgements.run(
            answering,
            questions=questions,
            judge=judging_by,
            out=out,
            method=method,
            against=against,
            revision=revision,
            limit=limit,
            prompts=prompts or judgements.PROMPTS,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
        )
    except (EndpointError, ValueError, OSError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    Console().print(judgements.table(results))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Folder of a fused model, or its id on the Hub.")],
    text: Annotated[str, typer.Argument(help="What to explain, or with --generate the prompt.")],
    generate: Annotated[int, typer.Option(help="Tokens to continue the text by.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything in JSON, for programs.")] = False,
) -> None:
    """Show who speaks: a text coloured, token by token, by the specialist that leads.

    Example: ultrafuser explain fused "What is 47 * 36?" --generate 40
    """
    from transformers.utils import logging

    from ..fused_folders import open_fused
    from ..reports import explanation, terminal

    logging.disable_progress_bar()
    try:
        tokens = explanation.explain(*open_fused(model), text, generate=generate)
    except (OSError, ValueError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    if as_json:
        echo(json.dumps([asdict(token) for token in tokens], indent=1))
    else:
        terminal.print_tokens(tokens)


@app.command()
def report(
    results: Annotated[Path | None, typer.Argument(help="results.json of `ultrafuser evaluate`.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the fused model, or its id on the Hub.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and the pictures.")] = Path("report"),
    training: Annotated[list[Path] | None, typer.Option(help="Checkpoint of a stage, for its curves.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text to colour, instead of the examples.")] = None,
    seed: Annotated[int, typer.Option(help="Of the held-out text, if there are no results.")] = 0,
) -> None:
    """Draw everything about a fused model into one web page, and each picture as SVG and PNG beside it.

    Example: ultrafuser report evaluated/results.json --model fused --out report
    """
    from transformers.utils import logging

    from ..fused_folders import open_fused
    from ..reports import report_folder
    from ..result_files import read_results

    logging.disable_progress_bar()
    try:
        page = report_folder.report(
            out,
            results=read_results(results) if results else None,
            fused=open_fused(model) if model else None,
            training=report_folder.read_training(training or []),
            examples={f"Text {number}": given for number, given in enumerate(text, 1)} if text else None,
            seed=seed,
        )
    except (OSError, ValueError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    echo(f"Open {page}")


@data.command("plan")
def data_plan(recipe: Annotated[Path, typer.Argument(help="YAML file that says what to make.")]) -> None:
    """What making a recipe's data would take: calls, tokens, money and time. Sends nothing.

    Example: ultrafuser data plan examples/recipes/ultrachat.yaml
    """
    from ..plain import Console

    _planned(recipe, Console())


@data.command("make")
def data_make(
    recipe: Annotated[Path, typer.Argument(help="YAML file that says what to make.")],
    out: Annotated[Path, typer.Option(help="Folder for the data. Run again, it goes on.")],
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable of the server's API key; a recipe's own is asked about.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before many calls, or calls that cost much.")] = False,
) -> None:
    """Make instruction data with a teacher behind any OpenAI-compatible server. Nothing is paid for twice.

    Example: ultrafuser data make examples/recipes/ultrachat_tiny.yaml --out ultrachat
    """
    from ..plain import Console

    console = Console(stderr=True)
    read, plan = _planned(recipe, console, key_variable)
    try:
        read.teacher.api_key()
    except ValueError as error:
        echo(error, err=True)
        raise typer.Exit(2) from None
    named = read.teacher.api_key_variable
    if named and key_variable is None:
        # who wrote the recipe chose the server: the user chooses what it gets
        if not (console.is_terminal and sys.stdin.isatty()):
            echo(
                f"A recipe does not choose alone which secret goes to which server, but this one sends what {named} "
                f"holds to {read.teacher.base_url}. If that is right: --key-variable {named}.",
                err=True,
            )
            raise typer.Exit(2)
        typer.confirm(f"Send what {named} holds to {read.teacher.base_url}?", abort=True, err=True)
    if not yes and (plan.total["calls"] > 1000 or plan.money > 1):
        if not console.is_terminal:
            echo("More than 1,000 calls, or a cost of more than 1, need a yes. Add --yes.", err=True)
            raise typer.Exit(2)
        typer.confirm("Make it?", abort=True, err=True)
    from ..data.synthesis_run import make_set

    try:
        report = make_set(read, out, plan.total["calls"], console)
    except (OSError, ValueError) as error:
        echo(error, err=True)
        raise typer.Exit(2) from None
    for domain, kinds in report["records"].items():
        console.print(f"{domain}: {sum(kinds.values()):,} conversations")
    for step, domains in report["given_up"].items():
        console.print(f"given up in step {step}, no reply could be used: {sum(domains.values()):,}")
    spent = f"{report['tokens_in'] + report['tokens_out']:,} tokens and {report['cost']:,.2f} in all"
    console.print(
        f"{report['replies']:,} replies, {report['refused']:,} refusals, {spent}: {out / 'dataset'}", soft_wrap=True
    )
    if report["stopped"] or not report["records"]:
        echo(report["stopped"] or f"No reply could be used; {out}/journal.jsonl holds them all.", err=True)
        raise typer.Exit(1)


def _planned(recipe: Path, console, key_variable: str | None = None):
    """The recipe and its plan, which is printed with where everything goes."""
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    from ..data.cost_plan import Plan
    from ..data.recipe import load_recipe
    from ..keys import described

    try:
        read = load_recipe(recipe)
        if key_variable is not None:
            read = read.model_copy(
                update={"teacher": read.teacher.model_copy(update={"api_key_variable": key_variable})}
            )
        plan = Plan(read)
    except (ValueError, OSError) as error:
        echo(error, err=True)
        raise typer.Exit(2) from None
    console.print(plan.table())
    console.print(plan.assumptions(), highlight=False)
    where = described(read.teacher.base_url, read.teacher.api_key_variable)
    console.print(f"Asked: {read.teacher.model!r} at {where}.", highlight=False, markup=False, soft_wrap=True)
    return read, plan


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder of a model, fused or not, or its id on the Hub.")],
    tasks: Annotated[
        list[str],
        typer.Argument(
            help="Suites (paper, code, instructions, mmlu_math, mmlu_medicine, mmlu_others, local) or tasks of lm-eval."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for one result file per task; what is in it is not run again.")],
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Allow tasks that execute what the model wrote.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    server: Annotated[
        str | None, typer.Option(help="Address of an OpenAI server of the model, such as vLLM's.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of further tasks, as lm-eval's --include_path.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random, and of the quickstart that made the model.")] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the model, its tokenizer, or --include."),
    ] = False,
) -> None:
    """Run benchmarks with lm-eval; one result file per task, so that a run that was killed goes on where it was.

    Example: ultrafuser bench fused local --run-code --out bench/fused
    """
    from ..atomic import sole_writer
    from ..evaluation import local_tasks, suites

    try:
        if "local" in tasks and include is None:
            include = out / "tasks"
            with sole_writer(include, "bench", ["*"]):
                local_tasks.write(include, seed)
        settings = {
            "limit": limit,
            "run_code": run_code,
            "trust_remote_code": trust_remote_code,
            "chat": chat,
            "server": server,
            "include": include,
        }
        results = suites.run_suite(model, tasks, out, **settings, batch_size=batch_size, dtype=dtype, seed=seed)
    except (OSError, ValueError) as error:
        echo(str(error), err=True)
        raise typer.Exit(2) from error
    for result in results.values():
        for task, scores in result["scores"].items():
            for metric, score in scores.items():
                stderr = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
                echo(f"{task:40} {metric:30} {score['value']:.4f}{stderr}")
    for group, mean in suites.mmlu_means(results).items():
        echo(f"{'MMLU, ' + group:40} {'mean over subjects':30} {mean:.4f}")


def main() -> None:
    """Entry point of the console script."""
    sys.unraisablehook = _interrupted_again
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
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(sys.argv[1])
        way = f" In UltraFuser's sources: pip install -c constraints.txt -e '.[{extra}]'" if extra else ""
        echo(f"`ultrafuser {sys.argv[1]}` needs {error.name!r}, which is not installed.{way}", err=True)
        raise SystemExit(2) from error
    finally:
        # all is done, or cleaned up: from here on Ctrl-C has nothing to tell
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted_again(unraisable) -> None:
    """Interrupts once more where Ctrl-C came while Python cleared something away, which cannot be interrupted."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # a moment later, as this is a part of the clearing
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)
