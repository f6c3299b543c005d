"""Answers judged by another model: compared in pairs, as AlpacaEval does, or graded from 1 to 10, as MT-Bench does.

The prompts are files of their own, in `prompts/`.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import Template

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..atomic import sole_writer, write_whole
from ..provenance import digest, weights_digest
from .answers import AnswerJournal, answer_through, read_journal
from .endpoint import BadReplyError, Endpoint, EndpointError, RefusedError, for_all
from .judge_scores import grading_scores, pairwise_scores
from .questions import Question, load_questions


PROMPTS = Path(__file__).parent / "prompts"
METHODS = ("pairwise", "grading")
USUAL_METHODS = {"alpaca_eval": "pairwise", "alpaca_eval_2": "pairwise", "mt_bench": "grading"}
ANSWERS, JUDGEMENTS, RESULTS = "answers.jsonl", "judgements.jsonl", "results.json"
ATTEMPTS = 3  # to get a verdict out of the judge
# the verdict, alone in the last line but for a word such as "Verdict:": what is quoted further up is none
_VERDICT = r"[^\[\]\w]*(?:\w+[^\[\]\w]+){{0,2}}\[\[({})\]\]\W*"
VERDICTS = {
    "pairwise": re.compile(_VERDICT.format("1|2|tie")),
    "grading": re.compile(_VERDICT.format("10|[1-9]")),
}
REMINDERS = {
    "pairwise": "Your reply does not end with a verdict. End with one line: `[[1]]`, `[[2]]` or `[[tie]]`.",
    "grading": "Your reply does not end with a grade. End with one line: a whole number from 1 to 10, as in `[[7]]`.",
}


def run(
    model: str | Path | Endpoint,
    *,
    questions: str,
    judge: Endpoint,
    out: Path,
    method: str | None = None,
    against: Path | None = None,
    revision: str | None = None,
    limit: int | None = None,
    prompts: Path = PROMPTS,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    batch_size: int = 8,
) -> dict:
    """Answers questions, has the answers judged, and writes `out/results.json`.

    `out/answers.jsonl` and `out/judgements.jsonl` keep all that was finished; run again, it does only the rest.

    Args:
        model: The folder of a model, or the endpoint that serves it.
        questions: A JSON Lines file or a name, as for `load_questions`.
        judge: The judging model.
        out: Folder for what is written.
        method: "pairwise" or "grading". Default for sets on the Hub: what they are known for.
        against: `answers.jsonl` of another run on the same questions, to compare with in place of their references.
        revision: Of questions on the Hub.
        limit: Take this many questions, the first.
        prompts: Folder of the judge's prompts, to use others than this package's.
        max_new_tokens: Of each answer.
        temperature: Of the answers; 0 is greedy.
        batch_size: Answers generated at once, from a folder.

    Returns:
        The results, as in the file: what was judged by whom, and `pairwise_scores` or `grading_scores`.

    Raises:
        ValueError: If something asked for is wrong: before anything is generated.
        OSError: If something cannot be read.
        EndpointError: If a server does not answer; it says what was kept.
    """
    asked, source = load_questions(questions, revision)
    asked = asked[:limit]
    method = method or USUAL_METHODS.get(questions)
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS} for the questions {questions!r}, but got {method!r}.")
    settings = _answer_settings(model, asked, max_new_tokens, temperature)
    opponents = _opponents(asked, against, settings) if method == "pairwise" else None
    templates = _templates(prompts, method)
    judge.key()

    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with sole_writer(out, "judge", (ANSWERS, JUDGEMENTS, RESULTS), begun=[ANSWERS]), bars as progress:
        try:
            answers, cut = _answer(model, asked, settings, judge, out, batch_size, progress)
            if method == "pairwise":
                items = list(_pairs(asked, answers, opponents, templates))
            else:
                items = list(_grades(asked, answers, templates))
            verdicts = _judge(judge, method, items, out, progress)
        except EndpointError as error:
            raise EndpointError(
                f"{error} Nothing is lost: what was finished is in {str(out)!r}. Once that is mended, run the same "
                f"command again to do only the rest."
            ) from error
    if method == "pairwise":
        scores = {"against": str(against or "reference"), **pairwise_scores(asked, verdicts, answers, opponents)}
    else:
        scores = grading_scores(asked, verdicts)
    results = {
        "method": method,
        "questions": source,
        "model": settings["model"],
        "judge": judge.model,
        "judge_options": judge.options,
        "answer_options": settings["options"],
        "answers_cut": cut,
        **scores,
    }
    write_whole(out / RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def _answer_settings(
    model: str | Path | Endpoint, questions: list[Question], max_new_tokens: int, temperature: float
) -> dict:
    """Returns the settings that an answer depends on."""
    settings = {"questions": digest([(q.id, q.turns) for q in questions])}
    if isinstance(model, Endpoint):
        options = {"max_tokens": max_new_tokens, "temperature": temperature, **model.options}
        return settings | {"model": model.model, "options": options}
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    folder = Path(model).resolve()
    weights = weights_digest(folder)
    if weights is None:
        raise FileNotFoundError(
            f"A model is a folder with safetensors weights, but {str(folder)!r} holds none. Point to the folder that "
            f"`save_pretrained` wrote, or pass the address of the server that serves the model."
        )
    return settings | {"model": str(folder), "weights": weights, "options": options}


def _opponents(questions: list[Question], against: Path | None, settings: dict) -> dict[str, list[str]]:
    """The answers to compare with, by question."""
    if against is None:
        if lacking := [q.id for q in questions if len(q.reference) != len(q.turns)]:
            raise ValueError(
                f"Comparing in pairs needs another answer for every turn, but {len(lacking)} questions have no "
                f"complete `reference`, such as {lacking[:3]}. Add them, pass another run's answers.jsonl as "
                f"`against`, or use method 'grading'."
            )
        return {q.id: q.reference for q in questions}
    theirs, rows = read_journal(against)
    if theirs.get("questions") != settings["questions"]:
        raise ValueError(
            f"Both models must have answered the same questions, but {str(against)!r} holds answers to others. Run "
            f"with the same questions and the same limit."
        )
    if lacking := [q.id for q in questions for t in range(len(q.turns)) if (q.id, t) not in rows]:
        raise ValueError(f"{str(against)!r} lacks answers, such as to {lacking[:3]}. Finish that run first.")
    return {q.id: [rows[q.id, t]["answer"] for t in range(len(q.turns))] for q in questions}


def _answer(
    model: str | Path | Endpoint,
    questions: list[Question],
    settings: dict,
    judge: Endpoint,
    out: Path,
    batch_size: int,
    progress: Progress,
) -> tuple[dict[str, list[str]], int]:
    """Answers by question, and how many were cut."""
    turns = [(q.id, t) for q in questions for t in range(len(q.turns))]
    with AnswerJournal(out / ANSWERS, settings) as journal:
        advance = _bar(progress, "answers", len(turns), len(journal.rows))
        if len(journal.rows) < len(turns):
            # generating takes long, and is for nothing if the judge then does not answer
            asyncio.run(_greet(judge))
            if isinstance(model, Endpoint):
                model = replace(model, options=settings["options"])
                asyncio.run(answer_through(model, questions, journal, advance=advance))
            else:
                # torch and all that comes with it, only where it is needed
                from .local_answers import answer_locally

                options = {**settings["options"], "batch_size": batch_size}
                answer_locally(Path(model), questions, journal, **options, advance=advance)
    answers = {q.id: [journal.rows[q.id, t]["answer"] for t in range(len(q.turns))] for q in questions}
    return answers, sum(row["finish"] == "length" for row in journal.rows.values())


async def _greet(judge: Endpoint) -> None:
    """One short request: what is wrong with address, key, model or options shows."""
    async with judge.connect() as ask:
        await ask([{"role": "user", "content": "Reply with the word: ready"}])


def _pairs(
    questions: list[Question], ours: dict, theirs: dict, templates: dict[str, Template]
) -> Iterator[tuple[str, int, str]]:
    """Question, order (0: our answer comes first) and prompt; in both orders, because judges favour a place."""
    for q in questions:
        both = _numbered(ours[q.id]), _numbered(theirs[q.id])
        for order, (first, second) in enumerate((both, both[::-1])):
            prompt = templates["pairwise"].substitute(question=_numbered(q.turns), first=first, second=second)
            yield q.id, order, prompt


def _numbered(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else "\n\n".join(f"(turn {t})\n{text}" for t, text in enumerate(texts, 1))


def _grades(
    questions: list[Question], answers: dict, templates: dict[str, Template]
) -> Iterator[tuple[str, int, str]]:
    """Question, turn and prompt."""
    for q in questions:
        said = [f"User:\n{u}\n\nAssistant:\n{a}" for u, a in zip(q.turns, answers[q.id], strict=True)]
        for turn in range(len(q.turns)):
            conversation = "\n\n".join(said[: turn + 1])
            if turn < len(q.reference):
                template, fields = templates["grading_with_reference"], {"reference": q.reference[turn]}
            else:
                template, fields = templates["grading"], {}
            yield q.id, turn, template.substitute(conversation=conversation, **fields)


_FIELDS = {
    "pairwise": {"pairwise": ("question", "first", "second")},
    "grading": {"grading": ("conversation",), "grading_with_reference": ("conversation", "reference")},
}


def _templates(folder: Path, method: str) -> dict[str, Template]:
    """The prompts of a method, each with exactly the fields that are filled in."""
    templates = {}
    for name, fields in _FIELDS[method].items():
        path = folder / f"{name}.md"
        templates[name] = Template(path.read_text(encoding="utf-8"))
        matches = [m for m in Template.pattern.finditer(templates[name].template) if not m["escaped"]]
        found = {m["named"] or m["braced"] or "$" for m in matches}
        if found != set(fields):
            raise ValueError(
                f"The prompt {str(path)!r} must hold the fields {[f'${f}' for f in fields]} and no other '$', but holds "
                f"{sorted(found)}. Write '$$' for a dollar."
            )
    return templates


def _judge(judge: Endpoint, method: str, items: list[tuple[str, int, str]], out: Path, progress: Progress) -> dict:
    """The judge's verdict on each item, None where it gave none, by question and part."""
    settings = {"method": method, "judge": judge.model, "options": judge.options, "prompts": digest(items)}
    with AnswerJournal(out / JUDGEMENTS, settings) as journal:
        advance = _bar(progress, "judgements", len(items), len(journal.rows))
        waiting = [item for item in items if item[:2] not in journal.rows]

        async def judge_waiting() -> None:
            await _greet(judge)
            async with judge.connect() as ask:

                async def work(item: tuple[str, int, str]) -> None:
                    id, part, prompt = item
                    journal.add(id, part, **await _verdict(ask, prompt, method))
                    advance()

                await for_all(waiting, work, judge.concurrency)

        if waiting:
            asyncio.run(judge_waiting())
    return {key: row["verdict"] for key, row in journal.rows.items()}


async def _verdict(ask: Callable, prompt: str, method: str) -> dict:
    """Asks until the judge gives a verdict, a few times at most. No verdict is ever made up for it."""
    messages, replies = [{"role": "user", "content": prompt}], []
    while len(replies) < ATTEMPTS:
        try:
            reply, _ = await ask(messages)
        except RefusedError as error:
            # the judge has answered other requests with these options: it is this prompt, too long for it, say
            return {"verdict": None, "replies": [*replies, f"refused: {error}"]}
        except BadReplyError as error:
            reply = str(error)
        replies.append(reply)
        last = reply.strip().rsplit("\n", 1)[-1]
        if found := VERDICTS[method].fullmatch(last):
            return {"verdict": found[1], "replies": replies}
        messages = [
            *messages[:1],
            {"role": "assistant", "content": reply},
            {"role": "user", "content": REMINDERS[method]},
        ]
    return {"verdict": None, "replies": replies}


def _bar(progress: Progress, name: str, total: int, done: int) -> Callable[[], None]:
    task = progress.add_task(name, total=total, completed=done)
    return lambda: progress.advance(task)


def table(results: dict) -> Table:
    """Tables the results of `run` for the terminal."""
    name, scale = ("win_rate", 100) if results["method"] == "pairwise" else ("score", 1)
    unit = " %" if scale == 100 else " of 10"
    shown = Table(title=f"{results['model']}, judged by {results['judge']}", title_justify="left", show_header=False)

    def row(label: str, value: float | None, note: str = "") -> None:
        shown.add_row(label, "unknown" if value is None else f"{value * scale:.2f}{unit}", note)

    ends = results["interval"]
    sure = f"95 % interval {ends[0] * scale:.2f} to {ends[1] * scale:.2f}" if ends else "too few to say how sure"
    row(name.replace("_", " "), results[name], sure)
    if results["method"] == "pairwise":
        lengths = " against ".join("?" if v is None else f"{v:.0f}" for v in results["mean_length"].values())
        row("at equal length", results["length_controlled_win_rate"], f"mean length {lengths} characters")
        row("orders agree", results["consistent"], "a judge that favours a place agrees less with itself")
    for category, value in results["by_category"].items():
        row(f"  {category}", value)
    shown.add_row("unjudged", str(results["unjudged"]), "no verdict to be had; counted nowhere else")
    shown.add_row("answers cut", str(results["answers_cut"]), "at their longest allowed length")
    return shown
