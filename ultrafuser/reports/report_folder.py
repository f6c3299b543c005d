"""All pictures of a fused model, and the page that holds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.files_ultrafuser import read_json
from trainers.stage_checkpoint import STATE_FILE

from ..atomic import sole_writer, write_whole
from ..evaluation.comparison import gate_statistics
from ..evaluation.measurement import held_out
from ..provenance import versions
from ..quickstart.corpora import DOMAINS, documents, splits
from ..result_files import by_name, check_fields, every, number, whole, word
from . import charts
from .colours import assign
from .explanation import FUSED, Token, explain
from .page import render
from .plots import save


EXAMPLES = {
    title: Path(__file__).with_name("examples").joinpath(file).read_text()
    for title, file in (
        ("Prose, code and mathematics in one text", "mixed.txt"),
        ("Code with words in it", "code.txt"),
    )
}
QUESTION = "Solve 3*x + 5 = 47 for x."
NEW_TOKENS = 160  # at most, of an answer
PAGE = "index.html"
# pictures have a name and an ending each
WRITES = (
    PAGE,
    *(f"{name}.*" for name in ("differences", "rows", "radar", "gate_*", "training_loss", "mix_*", "text_*")),
)


def report(
    out: Path,
    *,
    results: Mapping | None = None,
    fused: tuple[UltraFuserForCausalLM, PreTrainedTokenizerBase] | None = None,
    training: Mapping[str, Mapping] | None = None,
    examples: Mapping[str, str] | None = None,
    questions: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Draws every picture that the input allows, each into a file of its own, and all of them into one page.

    Args:
        out: Folder for the pictures and `index.html`.
        results: What `ultrafuser evaluate` wrote.
        fused: A fused model and its tokenizer: for texts coloured by who speaks, and, if `results` has no statistics
            of its gate, to measure them on held-out text of `ultrafuser.quickstart.corpora`.
        training: What `read_training` gives.
        examples: Texts to colour, by title. Default: `EXAMPLES`.
        questions: Questions whose answers are coloured, asked through the chat template if there is one. Default: one, if
            `examples` has its default, too.
        seed: Of the held-out text.

    Returns:
        The page.

    Raises:
        ValueError: If there is neither a model nor results, or the two have other specialists.
    """
    if fused is None and "specialists" not in (results or {}):
        raise ValueError(
            "A report needs something to report: pass `results` of `ultrafuser evaluate`, a fused model, or both."
        )
    results = dict(results or {})
    specialists = fused[0].config.specialist_names if fused else results["specialists"]
    if list(results.get("specialists", specialists)) != list(specialists):
        raise ValueError(
            f"Results and model must belong together, but the results' specialists are {results['specialists']} and "
            f"the model's {specialists}. Pass the model that was measured."
        )
    facts = {key.replace("_", " "): _plain(results[key]) for key in _FACTS if results.get(key) is not None}
    if fused and not results.get("gate"):
        results["gate"] = measure_gate(*fused, seed=seed)
        facts["gate measured on"] = f"held-out text of ultrafuser.quickstart.corpora, seed {seed}"
        facts.setdefault("versions", _plain(versions()))
    rows, gate = results.get("rows", []), results.get("gate") or {}
    trained_on = [domain for run in (training or {}).values() for domain in run["domains"]]
    colours = assign([*specialists, *gate.get("mean_weights", ()), *trained_on])

    if examples is None and questions is None:
        examples, questions = EXAMPLES, [QUESTION]
    texts = _texts(*fused, examples or {}, questions or []) if fused else {}
    with sole_writer(out, "report", WRITES):
        found = [
            *_comparison_figures(out, rows, colours),
            *_gate_figures(out, gate, specialists, colours),
            *_training_figures(out, training or {}, colours),
        ]
        for number, tokens in enumerate(texts.values()):
            # for places that show no web page, such as a README
            save(out / f"text_{number}", charts.draw_tokens, tokens, colours)
        page = render(
            f"Fused from {', '.join(specialists[:-1])} and {specialists[-1]}",
            facts=facts,
            rows=rows,
            left_out=results.get("left_out"),
            figures=found,
            texts=texts,
            colours={name: colours[name] for name in specialists},
        )
        write_whole(out / PAGE, page)
    return out / PAGE


# of a results file, in the order in which the page shows them
_FACTS = ("seed", "examples", "prompt_tokens", "machine", "commit", "versions", "config")


def measure_gate(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, texts: int = 96
) -> dict:
    """The gate's statistics on held-out text of every domain of `ultrafuser.quickstart.corpora`, 256 tokens of each."""
    rows = {d: [{"text": t} for t in splits(documents(d, seed))["held_out"][:texts]] for d in DOMAINS}
    data = {d: held_out(own, tokenizer, max_length=256, prompt_tokens=1) for d, own in rows.items()}
    return gate_statistics(model, data)


def read_training(checkpoints: Sequence[Path]) -> dict[str, dict]:
    """Reads log, domains and mixes of a stage from its checkpoints, by the name of the stage's folder.

    Raises:
        ValueError: If a folder is not a stage's checkpoint.
    """
    found = {}
    for folder in checkpoints:
        files = folder / "trainer_state.json", folder / STATE_FILE
        if missing := [file.name for file in files if not file.exists()]:
            raise ValueError(
                f"Training curves are drawn from a stage's checkpoint, but {str(folder)!r} has no {missing}. Pass a "
                f"folder such as stage-one/checkpoint-400."
            )
        state, stage = map(read_json, files)
        check_fields(files[0], state, _STATE, needed=tuple(_STATE))
        check_fields(files[1], stage, _STAGE, needed=tuple(_STAGE))
        found[folder.resolve().parent.name] = {
            "log": state["log_history"],
            "steps": state["global_step"],
            "domains": stage["domains"],
            "mixes": stage["mixes"],
        }
    return found


def _entry(value: object) -> bool:
    shown = by_name(number)({k: v for k, v in value.items() if k == "loss" or k.startswith("loss/")})
    return shown and whole(value.get("step"))


def _mix(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and whole(value[0]) and every(number)(value[1])


# what is drawn of a checkpoint's two files
_STATE = {"log_history": every(lambda value: isinstance(value, dict) and _entry(value)), "global_step": whole}
_STAGE = {"domains": every(word), "mixes": every(_mix)}


def _plain(value) -> str:
    """A fact in words: `text 96, code 96` for a dict."""
    return ", ".join(f"{key} {own}" for key, own in value.items()) if isinstance(value, dict) else str(value)


def _texts(model, tokenizer, examples: Mapping[str, str], questions: Sequence[str]) -> dict[str, list[Token]]:
    found = {title: explain(model, tokenizer, text) for title, text in examples.items()}
    ends = "" if tokenizer.chat_template else "\n"  # a text that is continued needs a line's end
    for question in questions:
        found[f"Asked: {question}"] = explain(model, tokenizer, question + ends, generate=NEW_TOKENS, chat=True)
    return found


def _figure(out: Path, name: str, title: str, caption: str, draw, *args) -> dict[str, str]:
    return {"title": title, "caption": caption, "svg": save(out / name, draw, *args)}


def _comparison_figures(out: Path, rows: Sequence[Mapping], colours: dict[str, str]):
    rows = sorted(rows, key=lambda row: row["mean"])
    if any(row["name"] != FUSED and row.get("difference") is not None for row in rows):
        caption = "Loss of every row minus the fused model's on the same tokens, with 95% intervals. Beyond ±0.1 the"
        caption += " axis is logarithmic."
        yield _figure(out, "differences", "Against the fused model", caption, charts.draw_differences, rows, colours)
    if rows:
        caption = "Held-out loss overall and by domain, with 95% intervals. Specialists have their colours."
        yield _figure(out, "rows", "Every row, every domain", caption, charts.draw_rows, rows, colours)
    if len({d for row in rows for d in row["loss"]}) > 2:
        caption = "Mean probability of a token relative to the best of these rows, which lies on the outer ring; the"
        caption += " rings are 1/4 apart. Dashed: the best row that is neither the fused model nor a specialist."
        yield _figure(out, "radar", "Who is good at what", caption, charts.draw_radar, rows, colours)


def _gate_figures(out: Path, gate: Mapping, specialists: Sequence[str], colours: dict[str, str]):
    if gate.get("mean_weights"):
        caption = "Mean gate weight of each specialist over the tokens of a domain."
        title = "Who speaks in which domain"
        yield _figure(out, "gate_by_domain", title, caption, charts.draw_gate_by_domain, gate["mean_weights"], colours)
    if gate.get("weights_by_position"):
        caption = f"The same by position, in bins of {gate['bin_tokens']} tokens."
        given = gate["weights_by_position"], specialists, gate["bin_tokens"], colours
        yield _figure(out, "gate_by_position", "Who speaks when", caption, charts.draw_gate_by_position, *given)
    if gate.get("entropy"):
        caption = "Mean entropy of the gate weights: 0 where one specialist always speaks alone."
        given = gate["entropy"], len(specialists), colours
        yield _figure(out, "gate_entropy", "How undecided the gate is", caption, charts.draw_gate_entropy, *given)


def _training_figures(out: Path, training: Mapping[str, Mapping], colours: dict[str, str]):
    logs = {name: run["log"] for name, run in training.items() if any("loss" in entry for entry in run["log"])}
    if logs:
        caption = "Training loss as logged, over all tokens and by domain."
        yield _figure(out, "training_loss", "Training", caption, charts.draw_losses, logs, colours)
    for name, run in training.items():
        # one that is fixed is a straight line
        if len(run["mixes"]) > 1:
            given = {name: run["mixes"]}, run["domains"], run["steps"], colours
            caption = "How often each domain was drawn."
            yield _figure(out, f"mix_{name}", f"The mix of {name} over time", caption, charts.draw_mixes, *given)
