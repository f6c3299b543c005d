"""Commands that measure, judge, explain and draw."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..plain import Console, echo
from .arguments import Examples, HeldOutData, Json, MaxLength, Model, PromptTokens, named
from .group import Group, hide_loading_bars


group = Group("Evaluate", extra="eval")


@group.command()
def evaluate(
    model: Model,
    data: HeldOutData,
    out: Annotated[Path, Option(help="Folder for the results. Run again, it goes on.")],
    tune: Annotated[list[str] | None, Option(help="DOMAIN=..., other data to tune baselines with.")] = None,
    also: Annotated[list[str] | None, Option(help="NAME=FOLDER of a further model to compare with.")] = None,
    specialists_of: Annotated[
        str | None, Option(help="Fused model from before stage two, whose specialists are untouched.")
    ] = None,
    base: Annotated[str | None, Option(help="Base model that the specialists were tuned from, for merges.")] = None,
    examples: Examples = 200,
    max_length: MaxLength = 1024,
    prompt_tokens: PromptTokens = 32,
    seed: Annotated[int, Option(help="Seed of controls and resampling.")] = 0,
) -> None:
    """Is fusing worth it? A fused model against its specialists, averages, routers and merges: one table.

    Example: ultrafuser evaluate fused --data text=text.jsonl --data code=code.jsonl --out evaluated
    """
    from ..evaluation import evaluation_run

    hide_loading_bars()
    results = evaluation_run.evaluate(
        model,
        named(data, "--data"),
        out,
        tune=named(tune, "--tune"),
        specialists_of=specialists_of,
        base=base,
        also=named(also, "--also"),
        examples=examples,
        max_length=max_length,
        prompt_tokens=prompt_tokens,
        seed=seed,
    )
    console = Console()
    console.print(
        *evaluation_run.tables(results), evaluation_run.verdict(results), *evaluation_run.left_out(results), sep="\n"
    )


@group.command()
def explain(
    model: Model,
    text: Annotated[str, Argument(help="Text to explain, or with --generate the prompt.")],
    generate: Annotated[int, Option(help="Tokens to continue the text by.", min=0)] = 0,
    chat: Annotated[bool, Option("--chat", help="Ask through the chat template, with --generate.")] = False,
    as_json: Json = False,
) -> None:
    """Show who speaks: a text coloured, token by token, by the specialist that leads.

    Example: ultrafuser explain fused "What is 47 * 36?" --generate 40
    """
    from ..pretrained import open_fused
    from ..reports import explanation, terminal

    if chat and not generate:
        raise ValueError("--chat asks a question, and its answer is coloured. Say how long it may be: --generate 40.")
    hide_loading_bars()
    tokens = explanation.explain(*open_fused(model), text, generate=generate, chat=chat)
    if as_json:
        echo(json.dumps([asdict(token) for token in tokens], indent=1))
    else:
        terminal.print_tokens(tokens)


@group.command()
def report(
    results: Annotated[Path | None, Argument(help="results.json of `ultrafuser evaluate`.")] = None,
    model: Annotated[str | None, Option(help="Folder of the fused model, or its id on the Hub.")] = None,
    out: Annotated[Path, Option(help="Folder for the page and the pictures.")] = Path("report"),
    training: Annotated[list[Path] | None, Option(help="Checkpoint of a stage, for its curves.")] = None,
    text: Annotated[list[str] | None, Option(help="Text to colour, instead of the examples.")] = None,
    ask: Annotated[list[str] | None, Option(help="Question to answer and colour, instead of the examples.")] = None,
    seed: Annotated[int, Option(help="Seed of the held-out text, if there are no results.")] = 0,
) -> None:
    """Draw everything about a fused model into one web page, and each picture as SVG and PNG beside it.

    Example: ultrafuser report evaluated/results.json --model fused --out report
    """
    from ..pretrained import open_fused
    from ..reports import report_folder
    from ..result_files import read_results

    hide_loading_bars()
    page = report_folder.report(
        out,
        results=read_results(results) if results else None,
        fused=open_fused(model) if model else None,
        training=report_folder.read_training(training or []),
        examples={f"Text {number}": given for number, given in enumerate(text or [], 1)} if text or ask else None,
        questions=ask,
        seed=seed,
    )
    echo(f"Open {page}")


@group.command()
def bench(
    model: Annotated[str, Argument(help="Folder of a model, fused or not, or its id on the Hub.")],
    tasks: Annotated[
        list[str],
        Argument(
            help="Suites (paper, code, instructions, math_cot, skills_math, mergebench, mmlu_math, mmlu_medicine, mmlu_others, local) "
            "or tasks of lm-eval."
        ),
    ],
    out: Annotated[Path, Option(help="Folder for one result file per task; what is in it is not run again.")],
    limit: Annotated[int | None, Option(help="Only so many questions of each task.")] = None,
    run_code: Annotated[bool, Option("--run-code", help="Allow tasks that execute what the model wrote.")] = False,
    chat: Annotated[bool, Option("--chat", help="Ask through the chat template.")] = False,
    server: Annotated[str | None, Option(help="Address of an OpenAI server of the model, such as vLLM's.")] = None,
    include: Annotated[Path | None, Option(help="Folder of further tasks, as lm-eval's --include_path.")] = None,
    mt_bench: Annotated[
        Path | None, Option(help="results.json of `judge --questions mt_bench`: prints the mean of it and MMLU.")
    ] = None,
    against: Annotated[
        list[str] | None,
        Option(
            help="NAME=FOLDER that bench wrote of another model: prints shares of its scores, and answers that flipped."
        ),
    ] = None,
    batch_size: Annotated[int, Option(help="Questions at a time.")] = 8,
    dtype: Annotated[str, Option(help="dtype of the weights.")] = "auto",
    seed: Annotated[int, Option(help="Seed of everything random, and of the quickstart that made the model.")] = 0,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model, its tokenizer, or --include.")
    ] = False,
) -> None:
    """Run benchmarks with lm-eval; one result file per task, so that a run that was killed goes on where it was.

    Example: ultrafuser bench fused local --run-code --out bench/fused
    """
    from ..atomic import sole_writer
    from ..evaluation import bench_changes, local_tasks, suites

    grade = None if mt_bench is None else suites.read_mt_bench(mt_bench, tasks)
    others = bench_changes.read_others(named(against, "--against"), suites.files_of(tasks))
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
    for result in results.values():
        for task, scores in result["scores"].items():
            for metric, score in scores.items():
                stderr = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
                echo(f"{task:40} {metric:30} {score['value']:.4f}{stderr}")
    for group, mean in suites.mmlu_means(results).items():
        echo(f"{'MMLU, ' + group:40} {'mean over subjects':30} {mean:.4f}")
    if others:
        Console().print(bench_changes.table(results, others))
    if grade is not None:
        both = suites.skills_mean(results, grade)
        echo(f"{'MMLU and MT-Bench':40} {'(100 MMLU + 10 MT-Bench) / 2':30} {both:.2f}")


@group.command()
def judge(
    model: Annotated[str, Argument(help="Folder of the model, or with --url its name on that server.")],
    questions: Annotated[str, Option(help="JSON Lines file, or alpaca_eval, alpaca_eval_2, mt_bench.")],
    judge: Annotated[str, Option(help="Name of the judging model on its server.")],
    out: Annotated[Path, Option(help="Folder for answers, judgements and results.json.")],
    judge_url: Annotated[str, Option(help="OpenAI-compatible server.")] = "https://api.openai.com/v1",
    judge_key_variable: Annotated[str | None, Option(help="Environment variable of its API key.")] = None,
    judge_options: Annotated[str, Option(help="More fields of its requests, as JSON.")] = '{"temperature": 0}',
    url: Annotated[str | None, Option(help="Server that serves the model, such as vLLM's.")] = None,
    key_variable: Annotated[str | None, Option(help="Environment variable of that server's API key.")] = None,
    method: Annotated[str | None, Option(help="pairwise or grading; needed for a file.")] = None,
    against: Annotated[Path | None, Option(help="answers.jsonl of another run to compare with.")] = None,
    revision: Annotated[str | None, Option(help="Commit of a Hub's data set.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Only this many questions.")] = None,
    prompts: Annotated[Path | None, Option(help="Folder of judge prompts other than the package's.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float, Option(min=0, help="Sampling temperature of the answers; 0 is greedy.")] = 0.0,
    batch_size: Annotated[int, Option(min=1, help="Answers generated at once, from a folder.")] = 8,
    concurrency: Annotated[int, Option(min=1, help="Requests at once.")] = 8,
    retries: Annotated[int, Option(min=0, help="Times a failed request is sent again, with back-off.")] = 6,
    timeout: Annotated[float, Option(min=0, help="Longest wait for a reply, in seconds.")] = 300.0,
) -> None:
    """Have another model compare (AlpacaEval) or grade (MT-Bench) a model's answers. Run again, it goes on.

    Example: ultrafuser judge fused --questions mt_bench --judge gpt-4.1 --out judged
    """
    from ..evaluation import judgements
    from ..evaluation.endpoint import Endpoint
    from ..keys import described

    try:
        options = dict(json.loads(judge_options))
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(f"an object in JSON was expected, but got {judge_options!r}.") from error
    shared = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
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
    Console().print(judgements.table(results))
