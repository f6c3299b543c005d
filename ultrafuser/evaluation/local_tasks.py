"""Benchmarks for lm-eval that need no download, from parts of the quickstart's corpora that no model was trained on.

| task | items | right if |
|---|---|---|
| `ultrafuser_arithmetic` | sums, products and equations, worked out up to a number | it writes that number |
| `ultrafuser_algebra` | derivatives and expansions, worked out up to a number | it writes that number |
| `ultrafuser_code` | functions with a line that is not finished | they run and return a value, in `sandbox` |
| `ultrafuser_prose` | the start of a paragraph, four ways to go on | it prefers the true one, each way against its probability alone |
| `ultrafuser_two_domains` | two starts of each of two domains, four ways to share out their ends | it prefers the true one |

Chance is 25 % in the last two. The last needs both domains: its four choices are the same words in another order, so
who knows one of the two domains only can tell two of the four apart, not all.
"""

import ast
import json
import random
import re
from pathlib import Path

from ..quickstart.corpora import DOMAINS, documents, splits
from . import sandbox


TEMPLATES = Path(__file__).with_name("tasks")
NAMES = tuple(f"ultrafuser_{name}" for name in ("arithmetic", "algebra", "code", "prose", "two_domains"))
PER_TASK = 200
PER_PAIR = 60  # of domains; fewer if the held-out part ends before
WORDS = {"text": (16, 8), "code": (10, 8), "math": (6, 6)}  # of a start, of an end
CALLED_WITH = "abc"

# lines that models of any size now and then finish, and what follows them
UNFINISHED = {
    "if {} is": "\n        return False\n    return True",
    "return {} ==": "",
    "return {} +": "",
    "return {}[": "",
    "return {}.": "",
    "return '": "",
    "return not": "",
    "return len(": "",
}


def write(folder: str | Path, seed: int = 0) -> None:
    """Writes the tasks `NAMES`: one file of items and one of lm-eval's YAML each, for its `--include_path`.

    The YAML points at the items by their absolute path.

    Args:
        folder: Made if it is not there.
        seed: Of the corpora, that is, the seed that the models were made with, by the same Python: another one parts
            the documents otherwise, so that models would be asked what they were trained on.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {domain: splits(documents(domain, seed)) for domain in DOMAINS}
    held_out = {domain: part["held_out"] for domain, part in parts.items()}
    numbers = next_numbers(held_out["math"], trained_on=parts["math"]["specialist"] + parts["math"]["fuse"])
    items = {
        "arithmetic": [item for item in numbers if item["kind"] in ("What", "Solve")],
        "algebra": [item for item in numbers if item["kind"] in ("Differentiate", "Expand")],
        "code": unfinished_functions(held_out["code"]),
        "prose": cloze(held_out["text"], random.Random(seed)),
        "two_domains": shared_out(held_out, random.Random(seed)),
    }
    for name, rows in items.items():
        if name != "two_domains":
            rows = random.Random(seed).sample(rows, min(PER_TASK, len(rows)))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = (TEMPLATES / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(template.replace("FOLDER", str(folder)))


def wrote(file: Path, text: str) -> bool:
    """Returns whether `write` wrote this file."""
    template = TEMPLATES / file.name
    return template.exists() and text == template.read_text().replace("FOLDER", str(file.parent.resolve()))


def next_numbers(texts: list[str], trained_on: list[str]) -> list[dict]:
    """Worked-out problems, cut before each number of the working. Problems that were trained on are left out."""
    seen = {_question(problem) for text in trained_on for problem in text.split("\n\n")}
    problems = dict.fromkeys(problem for text in texts for problem in text.split("\n\n"))
    items = []
    for problem in problems:
        question = _question(problem)
        # a number that begins a word: the space before it is a part of the answer's token
        for number in re.finditer(r" (\d+)\b", problem) if question not in seen else ():
            if number.start() > len(question):
                item = {"kind": question.split()[0], "prompt": problem[: number.start()], "answer": number[1]}
                items.append(item)
    return items


def _question(problem: str) -> str:
    return problem.partition("\n")[0]


def unfinished_functions(sources: list[str]) -> list[dict]:
    """Functions under the names of held-out ones, of one argument, each with one of the lines of `UNFINISHED`."""
    found = (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    names = dict.fromkeys((f.name, a.arg) for f in found for a in f.args.args if a.arg not in ("self", "cls"))
    items = []
    for name, argument in names:
        for line, rest in UNFINISHED.items():
            prompt = f"def {name}({argument}):\n    {line.format(argument)}"
            items.append({"prompt": prompt, "rest": rest, "call": f"{name}({CALLED_WITH!r})"})
    return items


def runs(item: dict, answers: list[str]) -> dict[str, float]:
    """Checks that the finished function runs and returns something: lm-eval's `process_results` of `ultrafuser_code`."""
    outcome = sandbox.run(item["prompt"] + answers[0] + item["rest"], item["call"])
    return {"runs": float(outcome.status == "passed" and outcome.value != "None")}


def cloze(texts: list[str], rng: random.Random) -> list[dict]:
    """The starts of paragraphs, with their own end among those of three others."""
    halves = _halves(texts, *WORDS["text"])
    rng.shuffle(halves)
    items = []
    for i, (start, end) in enumerate(halves):
        choices = [end] + [halves[(i + k) % len(halves)][1] for k in (1, 2, 3)]
        rng.shuffle(choices)
        items.append({"prompt": start, "choices": choices, "answer": choices.index(end)})
    return items


def shared_out(held_out: dict[str, list[str]], rng: random.Random) -> list[dict]:
    """Two starts of one domain and two of another, one after the other; the ends of each domain right or swapped."""
    halves = {domain: _halves(texts, *WORDS[domain]) for domain, texts in held_out.items()}
    items = []
    for first, second in (("text", "code"), ("text", "math"), ("code", "math")):
        ones, others = (rng.sample(halves[domain], len(halves[domain])) for domain in (first, second))
        for i in range(0, min(len(ones), len(others), 2 * PER_PAIR) - 1, 2):
            (a, a_end), (b, b_end), (c, c_end), (d, d_end) = *ones[i : i + 2], *others[i : i + 2]
            choices = [
                "\n\n".join([one, c + two, b + three, d + four])
                for one, three in ((a_end, b_end), (b_end, a_end))
                for two, four in ((c_end, d_end), (d_end, c_end))
            ]
            right = choices[0]
            rng.shuffle(choices)
            domains = f"{first} and {second}"
            items.append({"domains": domains, "prompt": a, "choices": choices, "answer": choices.index(right)})
    return items


def _halves(texts: list[str], start: int, end: int) -> list[tuple[str, str]]:
    # of each stretch of words: its first ones, and those after them
    found = []
    for paragraph in dict.fromkeys(p for text in texts for p in text.split("\n\n")):
        words = re.findall(r"\s*\S+", paragraph)
        for i in range(0, len(words) - start - end + 1, start + end):
            found.append(("".join(words[i : i + start]).lstrip("\n"), "".join(words[i + start : i + start + end])))
    return found
