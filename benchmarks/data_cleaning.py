"""Throughput, memory, recall and false positives of the data filters: `python -m benchmarks.data_cleaning`.

Records are recombined from `ultrafuser.quickstart.corpora`, with plants among them: passages of an evaluation set, duplicates,
near duplicates, broken code, wrong sums, refusals and other languages, each made so that it is what it is called by
construction. Each number of records runs in a process of its own, whose memory is watched together with its workers'.
Writes `results/data_cleaning.json`.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import psutil

from ultrafuser.data.cleaning import DROPPED, clean
from ultrafuser.data.decontamination import gram_hashes
from ultrafuser.data.sources import read_lines
from ultrafuser.quickstart.corpora import DOMAINS, documents


RESULTS = Path(__file__).parent.parent / "results" / "data_cleaning.json"
SIZES = (10_000, 30_000, 100_000)
# of each domain; a few times as many where there are many records
CHARACTERS = {"text": 300_000, "code": 700_000, "math": 170_000}
PIECES = 2
Draw = Callable[[str], list[str]]
ASKED = {
    "text": "Explain how this works.",
    "code": "Write this in Python.",
    "math": "Work this out, step by step.",
}
REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with this. Please ask for something else that I can do for you.",
    "As an AI language model, I do not have personal opinions on this topic.",
    "Sorry, I am unable to provide that information at the moment.",
    "Unfortunately, I can't answer this question without breaking my rules.",
)
FOREIGN = {
    "de": (
        "Die Funktion liest zuerst die Datei und gibt danach alle Zeilen zurück, die mit einem Buchstaben beginnen.",
        "Wenn die Liste leer ist, wird eine Ausnahme ausgelöst, die der Aufrufer behandeln muss.",
        "Am Ende wird die Verbindung geschlossen, auch wenn vorher ein Fehler aufgetreten ist.",
        "Jeder Eintrag besteht aus einem Namen und einem Wert, getrennt durch ein Gleichheitszeichen.",
    ),
    "fr": (
        "La fonction lit d'abord le fichier, puis elle renvoie toutes les lignes qui commencent par une lettre.",
        "Si la liste est vide, une exception est levée et l'appelant doit la traiter.",
        "À la fin, la connexion est fermée, même si une erreur s'est produite auparavant.",
        "Chaque entrée se compose d'un nom et d'une valeur, séparés par un signe égal.",
    ),
    "es": (
        "La función lee primero el archivo y después devuelve todas las líneas que empiezan con una letra.",
        "Si la lista está vacía, se lanza una excepción que debe tratar quien llama a la función.",
        "Al final se cierra la conexión, aunque antes se haya producido un error.",
        "Cada entrada consta de un nombre y un valor, separados por un signo igual.",
    ),
    "ru": (
        "Функция сначала читает файл, а затем возвращает все строки, которые начинаются с буквы.",
        "Если список пуст, возникает исключение, которое должен обработать вызывающий код.",
        "В конце соединение закрывается, даже если раньше произошла ошибка.",
        "Каждая запись состоит из имени и значения, разделённых знаком равенства.",
    ),
}


def pools(scale: int = 1, seed: int = 0) -> tuple[dict[str, list[str]], list[str]]:
    """Pieces to make records of, by domain, and passages of an evaluation set.

    No piece repeats another or shares thirteen words with the evaluation set: whatever a filter then says of them is
    wrong. It is told here by comparing lines and words themselves, as nothing in the filters does.
    """
    found, evaluation = {}, []
    for domain, characters in CHARACTERS.items():
        pieces = distinct(p for d in documents(domain, seed, scale * characters) for p in split(domain, d))
        held_out = len(pieces) // 10
        evaluation += pieces[:held_out]
        found[domain] = pieces[held_out:]
    known = {run for text in evaluation for run in runs(text)}
    return {d: [p for p in pieces if known.isdisjoint(runs(p))] for d, pieces in found.items()}, evaluation


def split(domain: str, document: str) -> list[str]:
    """Paragraphs of prose, problems of mathematics, and functions of code as they are."""
    return [document] if domain == "code" else document.split("\n\n")


def distinct(pieces: Iterable[str]) -> list[str]:
    """Those of whose longer lines at most one in five stands in an earlier one."""
    seen, chosen = set(), []
    for piece in pieces:
        lines = {line.strip() for line in piece.splitlines() if len(line) > 30} or {piece}
        if len(lines & seen) <= len(lines) / 5:
            chosen.append(piece)
        seen |= lines
    return chosen


def runs(text: str) -> list[tuple[str, ...]]:
    """Every thirteen words in a row."""
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


def sampled(found: dict[str, list[str]], rng: random.Random) -> Draw:
    """Draws pieces again and again, for more records than there are pieces: one more, so that few records are alike."""
    return lambda domain: rng.sample(found[domain], PIECES + 1)


def used_once(found: dict[str, list[str]], rng: random.Random) -> Draw:
    """Draws every piece once."""
    left = {domain: rng.sample(pieces, len(pieces)) for domain, pieces in found.items()}
    return lambda domain: [left[domain].pop() for _ in range(PIECES)]


def answer(domain: str, draw: Draw) -> str:
    """A few pieces as an answer; code in a fenced block."""
    text = "\n\n".join(draw(domain))
    return f"Here it is.\n\n```python\n{text}\n```\n\nCall it as you need it." if domain == "code" else text


def conversation(question: str, answer: str, domain: str) -> dict:
    """A record in the schema of the package."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain, "topic": "", "source": "corpora", "licence": "psf-2.0"}


def records(
    number: int, draw: Draw, evaluation: list[str], rng: random.Random, planted: float = 0.02
) -> Iterator[dict]:
    """Records of all domains in turn; a part of them is a plant, named under `plant`."""
    names, recent = itertools.cycle(PLANTS), {domain: [] for domain in DOMAINS}
    for domain in itertools.islice(itertools.cycle(DOMAINS), number):
        if rng.random() < planted and all(recent.values()):
            name = next(names)
            yield {**PLANTS[name](draw, evaluation, recent, rng), "plant": name}
        else:
            made = conversation(ASKED[domain], answer(domain, draw), domain)
            recent[domain] = [*recent[domain][-29:], made]
            yield made


# each makes what it is called by construction


def _contamination(draw, evaluation, recent, rng):
    passage = rng.choice([text for text in evaluation if len(text.split()) > 40]).split()
    start = rng.randrange(len(passage) - 30)
    # in another case and other punctuation
    words = re.sub(r"[.,]", " -- ", " ".join(passage[start : start + 30])).upper()
    first, *rest = answer("text", draw).split(". ")
    return conversation(ASKED["text"], ". ".join([first, words, *rest]), "text")


def _duplicate(draw, evaluation, recent, rng):
    old = rng.choice(recent[rng.choice(DOMAINS)])
    text = old["messages"][1]["content"]
    return conversation(ASKED[old["domain"]].upper(), text.replace("\n\n", "\n\n\n") + "  \n", old["domain"])


def _near_duplicate(draw, evaluation, recent, rng):
    words = rng.choice(recent["text"])["messages"][1]["content"].split(" ")
    # one word in fifty, which changes five shingles
    for i in range(25, len(words), 50):
        words[i] = "quux"
    return conversation(ASKED["text"], " ".join([*words, "Indeed."]), "text")


def _broken_code(draw, evaluation, recent, rng):
    breaks = (
        lambda text: text.replace(":\n", "\n", 1),
        lambda text: text.replace("(", "((", 1),
        lambda text: text.replace("\n    ", "\n", 1),
        lambda text: text.replace("\n```\n", "\nresult = (1,\n```\n"),
        lambda text: text.replace("\n```\n", "\nprint 'done'\n```\n"),
    )
    return conversation(ASKED["code"], rng.choice(breaks)(answer("code", draw)), "code")


def _wrong_sum(draw, evaluation, recent, rng):
    a, b, wrong = rng.randint(11, 99), rng.randint(11, 99), rng.choice([-10, -1, 1, 2, 10])
    sums = (
        f"What is {a} * {b}?\n{a} * {b} = {a * b + wrong}",
        f"First we add: {a} + {b} - 7 = {a + b} - 7 = {a + b - 7 + wrong}.",
        f"Altogether they have {a}*3 + {b} = <<{a}*3+{b}={3 * a + b + wrong}>>{3 * a + b + wrong} apples.",
        f"Expand (x + {a}) * (x + {b}).\n(x + {a}) * (x + {b}) = x**2 + {a + b + wrong}*x + {a * b}",
        f"The total is \\( {a} \\times {b} = {a * b + wrong} \\).",
        # with words in between, which the filter does not read: one in seven that it cannot find
        f"There are {a} apples + {b} apples = {a + b + wrong} apples.",
        f"Half of {a} apples and {b} apples makes {a}/2 + {b} = {a / 2 + b + wrong} of them.",
    )
    return conversation(ASKED["math"], f"{answer('math', draw)}\n\n{rng.choice(sums)}", "math")


def _refusal(draw, evaluation, recent, rng):
    return conversation(ASKED["text"], f"{rng.choice(REFUSALS)}\n\n{rng.choice(draw('text'))}", "text")


def _foreign(draw, evaluation, recent, rng):
    return conversation(ASKED["text"], " ".join(rng.sample(FOREIGN[rng.choice([*FOREIGN])], 2)), "text")


PLANTS = {
    "contamination": _contamination,
    "duplicate": _duplicate,
    "near_duplicate": _near_duplicate,
    "code": _broken_code,
    "arithmetic": _wrong_sum,
    "refusal": _refusal,
    "language": _foreign,
}


def recall(number: int = 1200, planted: float = 0.4, seed: int = 0, processes: int = 1) -> dict:
    """Counts, for each plant, those that the filter of its name finds; of all other records, those dropped, and why."""
    rng = random.Random(seed)
    found, evaluation = pools(seed=seed)
    rows = list(records(number, used_once(found, rng), evaluation, rng, planted))
    with tempfile.TemporaryDirectory() as folder:
        clean(rows, Path(folder), evaluation={"held out": gram_hashes(evaluation)}, processes=processes)
        dropped = {line["row"]: line for line in read_lines(Path(folder) / DROPPED)}
    result = {"records": number, "plants": {}}
    for name in PLANTS:
        members = [i for i, row in enumerate(rows, start=1) if row.get("plant") == name]
        hits = sum(i in dropped and dropped[i]["filter"] == name for i in members)
        result["plants"][name] = {"planted": len(members), "found": hits, "recall": round(hits / len(members), 4)}
    others = [i for i, row in enumerate(rows, start=1) if "plant" not in row]
    wrong = [dropped[i] for i in others if i in dropped]
    return {
        **result,
        "others": len(others),
        "false_positives": len(wrong),
        "false_positive_rate": round(len(wrong) / len(others), 4),
        "which": [{"filter": line["filter"], "why": line["why"]} for line in wrong],
    }


def run(number: int, processes: int) -> dict:
    """Cleans that many records, streamed, and tells how long that took and what came out."""
    rng = random.Random(0)
    found, evaluation = pools(scale=2)
    known = {"held out": gram_hashes(evaluation)}
    rows = records(number, sampled(found, rng), evaluation, rng)
    with tempfile.TemporaryDirectory() as folder:
        start, used = time.perf_counter(), processor_seconds()
        report = clean(rows, Path(folder), evaluation=known, processes=processes)
        seconds, used = time.perf_counter() - start, processor_seconds() - used
    return {"processes": processes, "seconds": round(seconds, 1), "processor_seconds": round(used, 1), **report}


def processor_seconds() -> float:
    """Returns the processor time of this process and its finished children, which other work on the machine changes little."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def watched(command: list[str]) -> tuple[dict, float]:
    """Returns the last line that a command printed, and the peak memory of it and its children together, in MiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        # one may end while it is asked
        with contextlib.suppress(psutil.NoSuchProcess):
            # pages that processes share are counted for each of them: the sum is an upper bound
            peak = max(peak, sum(p.memory_info().rss for p in (tree, *tree.children(recursive=True))))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return json.loads(process.stdout.read().splitlines()[-1]), round(peak / 2**20)


def measure_cleaning(number: int, processes: int) -> dict:
    """One number of records, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_cleaning", "--alone", str(number), "--processes", str(processes)]
    done, peak = watched(command)
    return {
        **done,
        "records_per_second": round(number / done["seconds"]),
        "processor_milliseconds_per_record": round(1000 * done["processor_seconds"] / number, 3),
        "peak_mib": peak,
        # other work on the machine makes seconds longer, and processor seconds less so
        "load_average": round(os.getloadavg()[1], 1),
    }


def save(result: dict) -> None:
    """Writes what there is so far."""
    smallest = min(result["rows"], key=lambda row: row["records"], default=None)
    for row in result["rows"]:
        row["peak_over_smallest"] = round(row["peak_mib"] / smallest["peak_mib"], 3)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Measures recall, then every number of records; or, told which, one of them, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=int)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(run(options.alone, options.processes)))
        return
    result = {
        "machine": {"kind": "cpu", "architecture": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("datasketch", "numpy", "py3langid", "sympy", "xxhash")},
        "recall": recall(processes=options.processes),
        "rows": [],
    }
    save(result)
    for number in SIZES:
        result["rows"].append(measure_cleaning(number, options.processes))
        save(result)
        print(result["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
