"""The card of a fused folder: what it is made of, how good it is, and what may be done with it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.files_ultrafuser import UnreadableFileError
from modeling_ultrafuser.fusions_ultrafuser import fusion_class
from modeling_ultrafuser.serving_ultrafuser import check_servable

from .. import licences
from ..atomic import write_whole
from ..plain import markdown, plain
from ..pretrained import fused_config, read_ingredients
from ..provenance import digest
from ..result_files import check_fields, read_results
from . import benchmark_results


TEMPLATE = Path(__file__).parent / "model_card.jinja"
LINK = re.compile(r"https://[\w./#?=&%~:+-]+", re.ASCII)
FUSED = "fused"  # the fused model's row in a comparison


def write_card(
    folder: Path,
    *,
    results: Sequence[Path] = (),
    specialists: Mapping[str, str] | None = None,
    data: Sequence[str] = (),
    repo: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes `README.md` into the folder of a fused model, with metadata in the Hub's form.

    Scores of benchmarks that have a leaderboard on the Hub are written beside it, see `write_eval_results`.

    Args:
        folder: Of the fused model.
        results: `results.json` of comparisons and judgements of this model, as `ultrafuser evaluate` and
            `ultrafuser judge` write them, and the files of tasks that `ultrafuser bench` writes.
        specialists: Name to Hub id or folder of each specialist. Their licences are read from their own cards.
            Default: what the folder says of them, if `ultrafuser fuse` wrote it.
        data: What the gate and the specialists were trained on: Hub ids, or words.
        repo: Id under which the model will be found. Default: the folder's name.
        overwrite: Replace a `README.md` that was not written, or has been changed since it was written, by this.

    Returns:
        Warnings about licences, in sentences; they are in the card, too.

    Raises:
        FileExistsError: If there is a `README.md` of someone else's.
        ValueError: If something given does not fit the folder.
        OSError: If something cannot be read.
    """
    path = folder / "README.md"
    if path.exists() and not overwrite and not _is_ours(path.read_text(encoding="utf-8")):
        raise FileExistsError(
            f"Only a card that this command wrote, and nobody has changed, is replaced unasked, but {str(path)!r} is "
            f"another's work. Move it away, or use --overwrite."
        )
    config = fused_config(folder)
    sources = dict(specialists or {})
    if unknown := sorted(set(sources) - set(config.specialist_names)):
        raise ValueError(f"The specialists in {str(folder)!r} are {config.specialist_names}, but got {unknown}.")
    ingredients = read_licences(folder, config.specialist_names, sources)
    loaded = [_load(file, config) for file in results]
    comparisons, judgements, benchmarks = ([r for r in loaded if key in r] for key in ("rows", "judge", "scores"))
    for benchmark in benchmarks:
        benchmark_results.check_same_model(benchmark, folder)
    benchmark_results.check_different_tasks(benchmarks)
    benchmark_results.write_eval_results(folder, benchmarks)
    repo = repo or folder.resolve().name
    warnings = licences.warnings(ingredients)
    metadata = ModelCardData(
        model_name=repo.split("/")[-1],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ultrafuser", "custom_code", "merge"],
        base_model=[i.model for i in ingredients if i.model] or None,
        base_model_relation="merge" if any(i.model for i in ingredients) else None,
        datasets=[d for d in data if re.fullmatch(r"[\w.-]+/[\w.-]+", d)] or None,
        eval_results=[*_compared(comparisons), *_judged(judgements), *benchmark_results.measured(benchmarks)] or None,
        **licences.common_licence(ingredients),
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        repo=repo,
        names=", ".join(config.specialist_names),
        mixed=config.fusion if fusion_class(config.fusion).has_loss else f"predictions ({config.fusion})",
        gate=config.gate,
        context=config.max_position_embeddings,
        size=_size(folder),
        specialists=[_described(i, c) for i, c in zip(ingredients, config.specialists, strict=True)],
        vllm_refusal=_vllm_refusal(config),
        data=data,
        comparisons=[_comparison(r) for r in comparisons],
        judgements=[_judgement(r) for r in judgements],
        benchmarks=benchmark_results.rows(benchmarks),
        warnings=[markdown(warning) for warning in warnings],
        licence=metadata.license,
    )
    text = plain(re.sub(r"\n{3,}", "\n\n", str(card))).rstrip() + "\n\n"
    write_whole(path, f"{text}<!-- ultrafuser card {digest(text)} -->\n")
    return warnings


def read_licences(
    folder: Path, names: Sequence[str], sources: Mapping[str, str] | None = None
) -> list[licences.Ingredient]:
    """The specialists of a fused folder and their licences: as the folder has them, but for those whose source is given.

    Args:
        folder: Of the fused model.
        names: Of its specialists.
        sources: Name to Hub id or folder.
    """
    recorded, sources = read_ingredients(folder), sources or {}
    return [
        _as_recorded(name, recorded[name])
        if name in recorded and name not in sources
        else licences.read_ingredient(name, sources.get(name))
        for name in names
    ]


def _is_ours(text: str) -> bool:
    """Returns whether this package wrote the card, and nobody has edited it since."""
    mark = re.search(r"<!-- ultrafuser card (\w+) -->\n\Z", text)
    return mark is not None and digest(text[: mark.start()]) == mark[1]


def _as_recorded(name: str, record: dict[str, str | None]) -> licences.Ingredient:
    stated = {key: record.get(key) for key in ("licence", "terms", "link", "problem")}
    if stated["licence"] is None and stated["problem"] is None:
        stated["problem"] = "the folder does not say"
    # only what comes from the Hub has a commit, and is there for others
    there = record.get("commit") and re.fullmatch(r"[\w.-]+/[\w.-]+", record.get("source") or "", re.ASCII)
    return licences.Ingredient(name, record["source"] if there else None, **stated)


def _load(path: Path, config: UltraFuserConfig) -> dict:
    results = read_results(path, benchmarks=True)
    if "rows" in results and results["specialists"] != config.specialist_names:
        raise ValueError(
            f"Results must be those of this model, whose specialists are {config.specialist_names}, but those in "
            f"{str(path)!r} are of {results['specialists']}."
        )
    if "rows" in results:
        _check_comparison(path, results)
    return results


def _check_comparison(path: Path, results: dict) -> None:
    """Refuses a comparison without what the card tells of it."""
    needed = ("mean_interval", "difference", "difference_interval")
    for row in results["rows"]:
        check_fields(path, row, {}, needed=needed, where=f"of {row['name'][:100]!r} ")
    fused = [row for row in results["rows"] if row["name"] == FUSED]
    domains = [list(row["loss"]) for row in results["rows"]]
    if len(fused) != 1 or any(sorted(d) != sorted(domains[0]) for d in domains):
        raise UnreadableFileError(
            f"{str(path)!r} is damaged",
            f"A comparison has one row {FUSED!r}, and a loss of every row in every domain",
            "Write it anew with `ultrafuser evaluate`.",
        )
    check_fields(path, fused[0], {}, needed=("accuracy", "calibration_error"), where=f"of {FUSED!r} ")
    check_fields(path, results, {}, needed=("gate",))
    gate = results["gate"]
    check_fields(path, gate, {}, needed=("mean_weights", "entropy"), where="of the gate ")
    check_fields(path, gate["entropy"], {}, needed=tuple(gate["mean_weights"]), where="of the gate's entropy ")


def _size(folder: Path) -> str:
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _described(ingredient: licences.Ingredient, config) -> dict:
    model = ingredient.model
    stated = markdown(ingredient.stated)
    return {
        "name": ingredient.name,
        "model": f"[{model}](https://huggingface.co/{model})" if model else "not on the Hub, or not stated",
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "licence": f"[{stated}]({ingredient.link})" if LINK.fullmatch(str(ingredient.link)) else stated,
    }


def _vllm_refusal(config: UltraFuserConfig) -> str | None:
    try:
        check_servable(config)
    except ValueError as error:
        return str(error)
    return None


def _fused_row(results: dict) -> dict:
    return next(row for row in results["rows"] if row["name"] == FUSED)


def _compared(comparisons: list[dict]) -> list[EvalResult]:
    """The fused model's measures, by domain."""
    metrics = {
        "loss": ("nats_per_token", "Loss, nats per token"),
        "accuracy": ("accuracy", "Share of next tokens guessed right"),
        "calibration_error": ("expected_calibration_error", "Expected calibration error"),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            # the Hub's form tells results apart by this, and not by the name
            dataset_config=domain,
            dataset_name=f"Held-out {domain}",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for results in comparisons
        for key, (kind, name) in metrics.items()
        for domain, value in _fused_row(results)[key].items()
    ]


def _judged(judgements: list[dict]) -> list[EvalResult]:
    found = []
    for results in judgements:
        key = "win_rate" if results["method"] == "pairwise" else "score"
        dataset, _, revision = results["questions"].partition("@")
        # a file's place on one machine says nothing to others
        dataset = dataset if revision else Path(dataset).stem
        if results[key] is not None:
            name = {"win_rate": "Win rate", "score": "Grade from 1 to 10"}[key]
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_revision=revision or None,
                    metric_type=key,
                    metric_name=f"{name}, judged by {results['judge']}",
                    metric_value=round(results[key], 4),
                )
            )
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _comparison(results: dict) -> dict:
    rows = sorted(results["rows"], key=lambda row: row["mean"])
    domains = list(rows[0]["loss"])
    lines = []
    for row in rows:
        low, high = row["mean_interval"]
        losses = [f"{row['loss'][d]:.3f}" for d in domains]
        mean = f"{row['mean']:.3f} ({low:.3f} to {high:.3f})"
        name = f"**{row['name']}**" if row["name"] == FUSED else markdown(row["name"])
        lines.append([name, *losses, mean])
    gate = results["gate"]
    names = results["specialists"]
    weights = [
        [markdown(domain), *(f"{share[n]:.2f}" for n in names), f"{gate['entropy'][domain]:.2f}"]
        for domain, share in gate["mean_weights"].items()
    ]
    made_with = {key: results[key] for key in ("seed", "commit", "machine") if key in results}
    made_with |= results.get("versions", {})
    told = ", ".join(markdown(f"{key} {value}") for key, value in made_with.items())
    return {
        "table": _table(["", *map(markdown, domains), "mean"], lines),
        "words": _ahead(rows),
        "gate": _table(["on", *names, "entropy"], weights),
        "made_with": f"Measured with {told}.",
    }


def _ahead(rows: list[dict]) -> str:
    """States which rows beat the fused model: a reader should not have to find them."""
    sentences = []
    for row in rows:
        if row["name"] != FUSED and row["difference"] < 0:
            low, high = (-end for end in reversed(row["difference_interval"]))
            sure = "" if low > 0 else "; this may be chance, because the interval holds 0"
            sentences.append(
                f"*{markdown(row['name'])}* beats the fused model by {-row['difference']:.3f} nats per token "
                f"(95 % interval {low:.3f} to {high:.3f}{sure})."
            )
    return " ".join(sentences) or "No other row beats the fused model."


def _judgement(results: dict) -> str:
    pairwise = results["method"] == "pairwise"
    value, ends = results["win_rate" if pairwise else "score"], results["interval"]
    judge = markdown(results["judge"])
    source = results["questions"] if "@" in results["questions"] else Path(results["questions"]).stem
    if value is None:
        return f"{judge} gave no verdict on the answers to {markdown(source)}."
    if pairwise:
        value, ends = value * 100, ends and [100 * end for end in ends]
        what = f"preferred this model's answers in {value:.1f} % of the questions"
    else:
        what = f"gave this model's answers {value:.2f} of 10 on average"
    sure = f" (95 % interval {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    unjudged = f" {results['unjudged']} had no verdict and are left out." if results["unjudged"] else ""
    return f"{judge} {what}{sure}, on {markdown(source)}.{unjudged}"
