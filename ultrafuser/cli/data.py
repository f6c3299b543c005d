"""Commands `ultrafuser data ...`: make, clean, take in, look at and push instruction data."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..plain import Console, echo
from ..source_names import split_source
from .arguments import TrustRemoteCode, named
from .group import Group, hide_bars


HELP = "Instruction data: make it, clean it, take it in, look at it."
Inputs = Annotated[list[str], Argument(help="Files of records, or folders or Hub sets in this schema.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]

group = Group("Data", extra="data")


@group.command()
def plan(recipe: Annotated[Path, Argument(help="YAML file that says what to make.")]) -> None:
    """Estimate calls, tokens, money and time of making a recipe's data. Sends nothing.

    Example: ultrafuser data plan examples/recipes/ultrachat.yaml
    """

    _planned(recipe, Console())


@group.command()
def make(
    recipe: Annotated[Path, Argument(help="YAML file that says what to make.")],
    out: Annotated[Path, Option(help="Folder for the data. Run again, it goes on.")],
    key_variable: Annotated[
        str | None, Option(help="Environment variable of the server's API key; a recipe's own is asked about.")
    ] = None,
    yes: Annotated[bool, Option("--yes", help="Do not ask before many calls, or calls that cost much.")] = False,
) -> None:
    """Make instruction data with a teacher behind any OpenAI-compatible server. Nothing is paid for twice.

    Example: ultrafuser data make examples/recipes/ultrachat_tiny.yaml --out ultrachat
    """

    console = Console(stderr=True)
    read, plan = _planned(recipe, console, key_variable)
    read.teacher.api_key()
    variable = read.teacher.api_key_variable
    if variable and key_variable is None:
        # who wrote the recipe chose the server: the user chooses what it gets
        if not (console.is_terminal and sys.stdin.isatty()):
            raise ValueError(
                f"A recipe does not choose alone which secret goes to which server, but this one sends what {variable} "
                f"holds to {read.teacher.base_url}. If that is right: --key-variable {variable}."
            )
        typer.confirm(f"Send what {variable} holds to {read.teacher.base_url}?", abort=True, err=True)
    if not yes and (plan.total["calls"] > 1000 or plan.money > 1):
        if not console.is_terminal:
            raise ValueError("This plan makes more than 1,000 calls or costs more than 1. Pass --yes to confirm.")
        typer.confirm("Make it?", abort=True, err=True)
    from ..data.synthesis_run import make_set

    report = make_set(read, out, plan.total["calls"], console)
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


@group.command()
def clean(
    records: Inputs,
    out: Annotated[Path, Option(help="Folder for kept.jsonl, dropped.jsonl and cleaning.json.")],
    against: Annotated[
        list[str] | None,
        Option(help="Evaluation set, NAME=FILE, NAME=HUB_ID or NAME=HUB_ID:CONFIG; may be given again."),
    ] = None,
    split: Annotated[str, Option(help="Split of evaluation sets that are on the Hub.")] = "test",
    languages: Annotated[str, Option(help="ISO 639-1 codes of the languages to keep, with commas.")] = "en",
    near: Annotated[float, Option(help="Jaccard similarity of near duplicates.")] = 0.7,
    shortest: Annotated[int, Option(help="Fewest characters.")] = 20,
    longest: Annotated[int, Option(help="Most characters.")] = 40_000,
    skip: Annotated[list[str] | None, Option(help="Filter to leave out; may be given again.")] = None,
    style_share: Annotated[float | None, Option(help="Part to keep whose style is most alike.")] = None,
    ifd_share: Annotated[float | None, Option(help="Part to keep that is most worth learning.")] = None,
    ifd_model: Annotated[str | None, Option(help="Model that is asked how hard each answer is.")] = None,
    processes: Annotated[int, Option(help="Processes for the filters of single records.")] = 2,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Drop what should not be trained on; show what was dropped and why.

    Example: ultrafuser data clean code.jsonl math.jsonl --out cleaned --against gsm8k=test.jsonl
    """
    if (ifd_share is None) != (ifd_model is None):
        raise typer.BadParameter("IFD is scored by a model and keeps a share: --ifd-model and --ifd-share together.")
    from ..data import cleaning, ranked_filters
    from ..data.decontamination import gram_hashes

    then = [] if style_share is None else [lambda folder: ranked_filters.keep_style(folder, style_share)]
    if ifd_model is not None:
        asked = ifd_model, trust_remote_code
        then.append(lambda folder: ranked_filters.keep_difficult(folder, *_loaded(*asked), ifd_share))
    evaluation = {name: gram_hashes(texts) for name, texts in _evaluation_sets(named(against, "--against"), split)}
    report = cleaning.clean(
        _records(records),
        out,
        languages=tuple(languages.split(",")),
        shortest=shortest,
        longest=longest,
        near=near,
        evaluation=evaluation,
        skip=skip or (),
        processes=processes,
        overwrite=overwrite,
        then=then,
    )
    echo(f"{cleaning.table(report)}\n{out / cleaning.KEPT}; why the others went: {out / cleaning.DROPPED}")


@group.command()
def take_in(
    name: Annotated[str, Argument(help="A known set (see --help), a file, a folder, or a Hub set.")],
    out: Annotated[Path, Option(help="File of records to write, .jsonl.")],
    domain: Annotated[str | None, Option(help="Domain of all records.")] = None,
    licence: Annotated[str | None, Option(help="Licence of all records, as the Hub writes it.")] = None,
    column: Annotated[
        list[str] | None, Option(help="Meaning of a column, as prompt=question; may be given again.")
    ] = None,
    files: Annotated[list[str] | None, Option(help="Copy of the set on this machine; may be given again.")] = None,
    config: Annotated[str | None, Option(help="Configuration of a Hub set.")] = None,
    split: Annotated[str | None, Option(help="Split of a Hub set.")] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a Hub set.")] = None,
    per_subset: Annotated[int | None, Option(help="Take so many rows of each configuration of a set.")] = None,
    limit: Annotated[int | None, Option(help="Take so many records only.")] = None,
    skip_malformed: Annotated[bool, Option("--skip-malformed", help="Leave such rows out, with a word.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Bring a set into the one schema: messages, domain, topic, source, licence.

    Known sets: ultrachat-200k, evol-instruct-code, mathinstruct, sharegpt, p3, medinstruct.

    Example: ultrafuser data take-in openai/gsm8k --config main --domain math --column prompt=question
    --column answer=answer --out gsm8k.jsonl
    """
    malformed: list[str] = []
    if out.exists() and not overwrite:
        raise FileExistsError(f"Nothing is overwritten unasked, but {str(out)!r} is there. Use --overwrite.")
    from ..data import sources

    options = {"domain": domain, "licence": licence, "config": config, "split": split, "revision": revision}
    options["per_subset"] = per_subset
    columns = named(column, "--column") or None

    def report(message: str) -> None:
        malformed.append(message)
        echo(message, err=True)

    on_malformed = report if skip_malformed else None
    rows = sources.take_in(name, columns=columns, files=files, on_malformed=on_malformed, **options)
    number = sources.write_records(itertools.islice(rows, limit), out)
    echo(f"{number:,} records, {len(malformed):,} malformed rows left out: {out}")


@group.command()
def look(
    records: Inputs,
    out: Annotated[Path, Option(help="Folder for index.html, README.md and statistics.json.")],
    name: Annotated[str, Option(help="Name of the set.")] = "data",
    tokenizer: Annotated[str | None, Option(help="Count lengths in its tokens, not in words.")] = None,
    seed: Annotated[int, Option(help="Seed of samples and map.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Describe a data set: counts, lengths, duplicates, a map and samples, as a page and a dataset card.

    Example: ultrafuser data look cleaned/kept.jsonl --out look --tokenizer Qwen/Qwen2.5-1.5B-Instruct
    """
    from ..data import dataset_report

    loaded = None
    if tokenizer:
        from ..pretrained import load_tokenizer

        loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    dataset_report.look(_records(records), out, name=name, tokenizer=loaded, seed=seed)
    echo(out / dataset_report.PAGE)


@group.command()
def push(
    records: Annotated[Path, Argument(help="File of records.")],
    repo_id: Annotated[str, Argument(help="owner/name on the Hub.")],
    card: Annotated[Path, Option(help="Dataset card, from `ultrafuser data look`.")],
    public: Annotated[bool, Option("--public", help="For all to see. Default: private.")] = False,
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload a set and its card to the Hub, after saying how large it is and who would see it.

    Example: ultrafuser data push cleaned/kept.jsonl me/ultrachat --card look/README.md
    """

    def agree(what: str) -> bool:
        echo(what)
        return yes or typer.confirm("Push?")

    from ..data.dataset_report import push_to_hub

    echo(push_to_hub(records, repo_id, card=card, private=not public, agree=agree) or "Nothing was sent.")


def _planned(recipe: Path, console, key_variable: str | None = None):
    """The recipe and its plan, which is printed with where everything goes."""
    hide_bars()
    from ..data.cost_plan import Plan
    from ..data.recipe import load_recipe
    from ..keys import described

    read = load_recipe(recipe)
    if key_variable is not None:
        read = read.model_copy(update={"teacher": read.teacher.model_copy(update={"api_key_variable": key_variable})})
    plan = Plan(read)
    console.print(plan.table())
    console.print(plan.assumptions(), highlight=False)
    where = described(read.teacher.base_url, read.teacher.api_key_variable)
    console.print(f"Asked: {read.teacher.model!r} at {where}.", highlight=False, markup=False, soft_wrap=True)
    return read, plan


def _loaded(name: str, trust_remote_code: bool) -> tuple:
    """A model and its tokenizer."""
    from ..pretrained import load_model, load_tokenizer

    model = load_model(name, dtype="auto", trust_remote_code=trust_remote_code)
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code)


def _records(names: list[str]) -> Iterator[dict]:
    from ..data.sources import take_in

    return itertools.chain.from_iterable(take_in(name) for name in names)


def _evaluation_sets(sources: dict[str, str], split: str) -> Iterator[tuple[str, Iterator[str]]]:
    from ..data.decontamination import strings
    from ..data.sources import raw_rows

    for name, source in sources.items():
        path, config = split_source(source)
        yield name, strings(raw_rows(path, config=config, split=split))
