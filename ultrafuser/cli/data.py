"""Commands `ultrafuser data clean`, `take-in`, `look` and `push`."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..plain import echo


app = typer.Typer()
Inputs = Annotated[list[str], typer.Argument(help="Files of records, or folders or Hub sets in this schema.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model's or tokenizer's folder.")
]


@app.command()
def clean(
    records: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for kept.jsonl, dropped.jsonl and cleaning.json.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation set, name=file, name=id or name=id:config; may be given again."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of evaluation sets that are on the Hub.")] = "test",
    languages: Annotated[str, typer.Option(help="ISO 639-1 codes of the languages to keep, with commas.")] = "en",
    near: Annotated[float, typer.Option(help="Jaccard similarity of near duplicates.")] = 0.7,
    shortest: Annotated[int, typer.Option(help="Fewest characters.")] = 20,
    longest: Annotated[int, typer.Option(help="Most characters.")] = 40_000,
    skip: Annotated[list[str] | None, typer.Option(help="Filter to leave out; may be given again.")] = None,
    style_share: Annotated[float | None, typer.Option(help="Part to keep whose style is most alike.")] = None,
    ifd_share: Annotated[float | None, typer.Option(help="Part to keep that is most worth learning.")] = None,
    ifd_model: Annotated[str | None, typer.Option(help="Model that is asked how hard each answer is.")] = None,
    processes: Annotated[int, typer.Option(help="Processes for the filters of single records.")] = 2,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Drop what should not be trained on; show what was dropped and why.

    Example: ultrafuser data clean code.jsonl math.jsonl --out cleaned --against gsm8k=test.jsonl
    """
    if (ifd_share is None) != (ifd_model is None):
        raise typer.BadParameter("IFD is scored by a model and keeps a share: --ifd-model and --ifd-share together.")
    with _in_words():
        from ..data import cleaning, ranked_filters
        from ..data.decontamination import gram_hashes

        then = [] if style_share is None else [lambda folder: ranked_filters.keep_style(folder, style_share)]
        if ifd_model is not None:
            asked = functools.partial(_loaded, ifd_model, trust_remote_code)
            then.append(lambda folder: ranked_filters.keep_difficult(folder, *asked(), ifd_share))
        evaluation = {name: gram_hashes(texts) for name, texts in _evaluation_sets(against or [], split)}
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


@app.command()
def take_in(
    name: Annotated[str, typer.Argument(help="A known set (see --help), a file, a folder, or a Hub set.")],
    out: Annotated[Path, typer.Option(help="File of records to write, .jsonl.")],
    domain: Annotated[str | None, typer.Option(help="Domain of all records.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of all records, as the Hub writes it.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="What a column holds, as prompt=question; may be given again.")
    ] = None,
    files: Annotated[
        list[str] | None, typer.Option(help="Copy of the set on this machine; may be given again.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a Hub set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take so many records only.")] = None,
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Leave such rows out, with a word.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Bring a set into the one schema: messages, domain, topic, source, licence.

    Known sets: ultrachat-200k, evol-instruct-code, mathinstruct, sharegpt, p3, medinstruct.

    Example: ultrafuser data take-in openai/gsm8k --config main --domain math --column prompt=question
    --column answer=answer --out gsm8k.jsonl
    """
    malformed: list[str] = []
    with _in_words():
        if out.exists() and not overwrite:
            raise FileExistsError(f"Nothing is overwritten unasked, but {str(out)!r} is there. Use --overwrite.")
        from ..data import sources

        options = {"domain": domain, "licence": licence, "config": config, "split": split, "revision": revision}
        columns = dict(_pair(text) for text in column or []) or None

        def report(message: str) -> None:
            malformed.append(message)
            echo(message, err=True)

        on_malformed = report if skip_malformed else None
        rows = sources.take_in(name, columns=columns, files=files, on_malformed=on_malformed, **options)
        number = sources.write_records(itertools.islice(rows, limit), out)
    echo(f"{number:,} records, {len(malformed):,} malformed rows left out: {out}")


@app.command()
def look(
    records: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for index.html, README.md and statistics.json.")],
    name: Annotated[str, typer.Option(help="Name of the set.")] = "data",
    tokenizer: Annotated[str | None, typer.Option(help="Count lengths in its tokens, not in words.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples and map.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What is in a set: counts, lengths, duplicates, a map and samples, as a page and a dataset card.

    Example: ultrafuser data look cleaned/kept.jsonl --out look --tokenizer Qwen/Qwen2.5-1.5B-Instruct
    """
    with _in_words():
        from ..data import dataset_report

        loaded = None
        if tokenizer:
            from ..pretrained import load_tokenizer

            loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        dataset_report.look(_records(records), out, name=name, tokenizer=loaded, seed=seed)
    echo(out / dataset_report.PAGE)


@app.command()
def push(
    records: Annotated[Path, typer.Argument(help="File of records.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    card: Annotated[Path, typer.Option(help="Dataset card, from `ultrafuser data look`.")],
    public: Annotated[bool, typer.Option("--public", help="For all to see. Default: private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload a set and its card to the Hub, after saying how large it is and who would see it.

    Example: ultrafuser data push cleaned/kept.jsonl me/ultrachat --card look/README.md
    """

    def agree(what: str) -> bool:
        echo(what)
        return yes or typer.confirm("Push?")

    with _in_words():
        from ..data.dataset_report import push_to_hub

        echo(push_to_hub(records, repo_id, card=card, private=not public, agree=agree) or "Nothing was sent.")


def _loaded(name: str, trust_remote_code: bool) -> tuple:
    """A model and its tokenizer."""
    from ..pretrained import load_model, load_tokenizer

    model = load_model(name, dtype="auto", trust_remote_code=trust_remote_code)
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code)


def _records(names: list[str]) -> Iterator[dict]:
    from ..data.sources import take_in

    return itertools.chain.from_iterable(take_in(name) for name in names)


def _evaluation_sets(texts: list[str], split: str) -> Iterator[tuple[str, Iterator[str]]]:
    from ..data.decontamination import strings
    from ..data.sources import raw_rows

    for name, path in map(_pair, texts):
        # a configuration is written behind the id, as in gsm8k=openai/gsm8k:main
        path, _, config = (path, "", "") if Path(path).exists() else path.partition(":")
        yield name, strings(raw_rows(path, config=config or None, split=split))


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise typer.BadParameter(f"Two words with = between them are needed, but got {text!r}.")
    return name, value


@contextmanager
def _in_words() -> Iterator[None]:
    """What a user can put right is said in words, without a traceback."""
    try:
        yield
    except ModuleNotFoundError:
        # `cli.main` says which extra brings it
        raise
    except (ValueError, OSError, ImportError) as error:
        echo(error, err=True)
        raise typer.Exit(2) from None
