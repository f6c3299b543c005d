"""Makes the small sets that `ultrafuser quickstart --real` fits its gate on and measures with.

    python -m experiments.real.quickstart_set --base base

Mathematics and code are drawn as the specialists' data, but anew; prose is what the base answers. Rows of "both" need a
program and a worked number.
"""

import argparse
import itertools
import json
import re
from pathlib import Path
from random import Random

from experiments.real import coding, instructions, worked_arithmetic
from experiments.real.dataset import programmed, row, worked, written
from experiments.real.generating import answers
from experiments.real.measuring import loaded
from experiments.real.splitting import draw
from ultrafuser.quickstart.real_data import GATE_ROWS, HELD_OUT_ROWS


FRESH = 1000  # added to the seed, so that the specialists were not tuned on these draws
LONGEST = 96  # tokens of an answer in prose


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = loaded(options.base, None)

    def prose(count: int, held_out: bool) -> list[dict]:
        questions = instructions.prose_questions(options.seed + FRESH, count, held_out)
        replies = answers(model, tokenizer, questions, LONGEST)
        return [row("prose", q, whole_sentences(a)) for q, a in zip(questions, replies, strict=True)]

    seed = options.seed + FRESH
    items, tasks = worked_arithmetic.training_items(seed, 60), coding.training_tasks(seed, 60)
    rows = {"text": prose(60, False), "math": map(worked, items), "code": map(written, tasks)}
    write(GATE_ROWS, {**rows, "both": both(seed, 40, held_out=False)})
    items, tasks = worked_arithmetic.held_out_items(seed, 3), coding.held_out_tasks(seed, 18)
    rows = {"text": prose(18, True), "math": map(worked, items), "code": map(written, tasks)}
    write(HELD_OUT_ROWS, {**rows, "both": both(seed, 18, held_out=True)})


def whole_sentences(reply: str) -> str:
    """The sentences of an answer, up to where it is cut or says one again."""
    sentences = re.findall(r".+?[.!?](?=\s|$)\s*", reply.strip(), re.DOTALL)
    kept = list(itertools.takewhile(lambda pair: pair[1] not in sentences[: pair[0]], enumerate(sentences)))
    return "".join(sentence for _, sentence in kept).strip() or reply.strip()


def both(seed: int, count: int, *, held_out: bool) -> list[dict]:
    """Word problems to solve with a program and in worked steps."""
    random = Random(f"mixed {seed} {held_out}")
    return [programmed(draw(worked_arithmetic.word_problem, random, held_out)) for _ in range(count)]


def write(path: Path, rows: dict) -> None:
    """Writes conversations by domain as JSON lines."""
    lines = [{"domain": domain, "messages": found["messages"]} for domain, own in rows.items() for found in own]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
