"""From a recipe to instruction data, step by step, as UltraChat 2 was made (Ding et al., 2024, section 3).

Every step but the first is a function from the rows of the step before to more or other rows. What it needs from the
teacher it asks for with `collect`, whose replies come in the order of the rows: the same replies make the same data.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from math import comb

import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets

from trainers.template_sandbox import RenderingError, render_prompt

from .recipe import Domain, Recipe, load_prompts
from .teacher import Request, Teacher
from .teacher_output import read_items, writable


TOPIC_TOKENS = 16  # of a topic, a sub-topic or a skill, to foresee the cost
KNOWN_ITEMS = 40  # most that a prompt shows of what exists already
BLOCK = 2048  # rows whose requests are in memory at once

TEXT = Value("string")
COLUMNS = {"domain": TEXT, "topic": TEXT, "subtopic": TEXT, "kind": TEXT, "skills": List(TEXT)}
ROWS = Features(COLUMNS | {"instruction": TEXT})
CONVERSATIONS = Features({"messages": List({"role": TEXT, "content": TEXT})} | COLUMNS)
EMPTY = {"topic": "", "subtopic": "", "kind": "", "skills": [], "instruction": ""}
RECORDS = Features(CONVERSATIONS | {"source": TEXT, "licence": TEXT})


class Maker:
    """State that every step needs.

    Attributes:
        recipe: What is made.
        teacher: Who is asked. None only foresees.
        given_up: Items that were never had in a form that could be used, by step and domain.
        seen: Instructions of each domain, to keep none twice.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher | None = None) -> None:
        self.recipe, self.teacher = recipe, teacher
        self.prompts = load_prompts(recipe.prompts)
        self.given_up: Counter[tuple[str, str]] = Counter()
        self.seen: dict[str, set[str]] = {name: set() for name in recipe.domains}

    def request(self, step: str, row: dict, number: int | None, known: list[str], sample: int) -> Request:
        """Returns a step's request about one row."""
        domain = self.recipe.domains[row["domain"]]
        filled = {"instruction": "", "conversation": row.get("messages"), **row}
        filled |= {"description": domain.description, "number": number, "known": known[-KNOWN_ITEMS:]}
        try:
            prompt = render_prompt(self.prompts[step], filled)
        except RenderingError as error:
            raise ValueError(f"The prompt of step {step!r}, `{step}.md`, cannot be filled in: {error}.") from error
        if step == "answers":
            messages = [{"role": "system", "content": prompt}] * bool(prompt.strip()) + row["messages"]
        else:
            messages = [{"role": "user", "content": prompt}]
        return Request(step, row["domain"], messages, number, sample, _reply_tokens(step, domain, number))

    def shares(self, rows: Dataset, total: Callable[[Domain], int]) -> list[int]:
        """Returns how many to make from each row, so that every domain gets its total, as evenly as possible."""
        names, numbers = rows["domain"][:], []
        rows_left, left = Counter(names), {name: total(d) for name, d in self.recipe.domains.items()}
        for name in names:
            numbers.append(-(-left[name] // rows_left[name]))
            left[name] -= numbers[-1]
            rows_left[name] -= 1
        return numbers


def _reply_tokens(step: str, domain: Domain, number: int | None) -> int:
    each = TOPIC_TOKENS if step in ("meta_topics", "sub_topics", "skills") else domain.instruction_tokens
    return domain.answer_tokens if step == "answers" else each * (number or 1)


def collect(
    maker: Maker, step: str, rows: Dataset, numbers: list[int] | None = None, seen: dict[str, set] | None = None
) -> list[list[str]]:
    """Asks about every row until it has its number of items, in rounds.

    A reply that cannot be used, or that repeats what exists, leaves something missing, which the next round asks for.

    Args:
        maker: Recipe and teacher.
        step: Names the prompt.
        rows: What to ask about.
        numbers: Items wanted of each row, as a list that the teacher writes. None wants one text of each.
        seen: With `numbers`, items that exist in each domain, which are not taken again; grows.

    Returns:
        For each row, its items.
    """
    recipe, rows = maker.recipe, rows.to_list()
    lists, numbers = numbers is not None, numbers or [1] * len(rows)
    found: list[list[str]] = [[] for _ in rows]
    rounds = [-(-n // recipe.items_per_request) + recipe.more_rounds for n in numbers]
    for sample in count():
        wanting = [i for i in range(len(rows)) if len(found[i]) < numbers[i] and sample < rounds[i]]
        if not wanting or maker.teacher.stopped:
            break
        for block in (wanting[k : k + BLOCK] for k in range(0, len(wanting), BLOCK)):
            asked = [min(numbers[i] - len(found[i]), recipe.items_per_request) if lists else None for i in block]
            requests = [maker.request(step, rows[i], n, found[i], sample) for i, n in zip(block, asked, strict=True)]
            for i, n, reply in zip(block, asked, maker.teacher.ask(requests), strict=True):
                if reply is not None and lists:
                    found[i] += _fresh(read_items(reply.text)[:n], seen[rows[i]["domain"]])
                elif reply is not None and (recipe.keep_cut_off or not reply.cut_off):
                    found[i] += [text] if (text := writable(reply.text)) else []
    if not maker.teacher.stopped:
        for row, number, items in zip(rows, numbers, found, strict=True):
            maker.given_up[step, row["domain"]] += number - len(items)
    return found


def _fresh(items: list[str], seen: set[str]) -> list[str]:
    fresh = []
    for item in items:
        words = " ".join(item.casefold().split())
        if words not in seen:
            seen.add(words)
            fresh.append(item)
    return fresh


def _table(rows: list[dict], features: Features = ROWS) -> Dataset:
    # ten times as fast as `Dataset.from_list`, and hundreds of thousands of rows go through every step
    return Dataset(pa.Table.from_pylist(rows, schema=features.arrow_schema))


def _children(rows: Dataset, found: list[list[str]], **columns: Callable[[str], object]) -> Dataset:
    """One row per item, like the row that it came from but for the given columns."""
    pairs = [(row, item) for row, items in zip(rows.to_list(), found, strict=True) for item in items]
    return _table([row | {name: make(item) for name, make in columns.items()} for row, item in pairs])


def domains(maker: Maker) -> Dataset:
    """One row per domain, where everything begins."""
    return _table([EMPTY | {"domain": name} for name in maker.recipe.domains])


def meta_topics(maker: Maker, rows: Dataset) -> Dataset:
    """The topics of each domain."""
    numbers = maker.shares(rows, lambda domain: domain.meta_topics)
    seen = {name: set() for name in maker.recipe.domains}
    return _children(rows, collect(maker, "meta_topics", rows, numbers, seen), topic=str)


def sub_topics(maker: Maker, rows: Dataset) -> Dataset:
    """The sub-topics of each topic."""
    numbers = maker.shares(rows, lambda domain: domain.sub_topics)
    seen = {name: set() for name in maker.recipe.domains}
    return _children(rows, collect(maker, "sub_topics", rows, numbers, seen), subtopic=str)


def instructions(maker: Maker, rows: Dataset) -> Dataset:
    """The first instructions about each sub-topic: as many as leave room for their expansion."""
    numbers = maker.shares(rows, lambda domain: expansion_totals(domain)[0])
    found = collect(maker, "instructions", rows, numbers, maker.seen)
    return _children(rows, found, instruction=str, kind=lambda _: "seed")


def expansion_totals(domain: Domain) -> tuple[int, int, int]:
    """Splits a domain's number of instructions into first, strongly and weakly related ones."""
    first = -(-domain.instructions // (1 + domain.strong + domain.weak))
    strong = round((domain.instructions - first) * domain.strong / ((domain.strong + domain.weak) or 1))
    return first, strong, domain.instructions - first - strong


def expansion(maker: Maker, rows: Dataset) -> Dataset:
    """The rows, and instructions that are strongly and weakly related to them."""
    parts = [rows]
    for place, kind in enumerate(("strong", "weak"), start=1):
        numbers = maker.shares(rows, lambda domain, place=place: expansion_totals(domain)[place])
        found = collect(maker, kind, rows, numbers, maker.seen)
        parts.append(_children(rows, found, instruction=str, kind=lambda _, kind=kind: kind))
    return concatenate_datasets(parts)


def skill_pairs(maker: Maker, rows: Dataset) -> Dataset:
    """The rows, and instructions that need two skills or more, of one domain or the last of another."""
    options = {name: d.skills for name, d in maker.recipe.domains.items() if d.skills}
    if not options:
        return rows
    starts = _table([row for row in domains(maker).to_list() if row["domain"] in options])
    seen = {name: set() for name in options}
    found = collect(maker, "skills", starts, [options[n].number for n in starts["domain"][:]], seen)
    skills = dict(zip(starts["domain"][:], found, strict=True))
    meeting = []
    for row in starts.to_list():
        name = row["domain"]
        own, together = skills[name], options[name].together
        others = [skills[other] for other in options if other != name]
        rng = random.Random(f"{maker.recipe.seed} pairs {name}")
        # by number, for a list of all might be huge
        most = comb(len(own), together)
        drawn = [nth_combination(own, together, n) for n in rng.sample(range(most), min(options[name].pairs, most))]
        most = comb(len(own), together - 1) * sum(map(len, others))
        numbers = rng.sample(range(most), min(options[name].across, most))
        drawn += [nth_across(own, together - 1, others, n) for n in numbers]
        meeting += [row | {"topic": "skills", "kind": "skills", "skills": found} for found in drawn]
    pairs = _table(meeting)
    found = collect(maker, "pairs", pairs, [1] * len(pairs), maker.seen)
    return concatenate_datasets([rows, _children(pairs, found, instruction=str)])


def nth_combination(items: list[str], size: int, number: int) -> list[str]:
    """Returns the combination of a number, from 0, in the order of `itertools.combinations`, without those before it."""
    found = []
    for place, item in enumerate(items):
        if len(found) == size:
            break
        with_it = comb(len(items) - place - 1, size - len(found) - 1)
        if number < with_it:
            found.append(item)
        else:
            number -= with_it
    return found


def nth_across(own: list[str], size: int, others: list[list[str]], number: int) -> list[str]:
    """Returns so many of one list and one of another, by number: all with the first other list, then with the second."""
    for other in others:
        first, last = divmod(number, len(other))
        if first < comb(len(own), size):
            break
        number -= comb(len(own), size) * len(other)
    return [*nth_combination(own, size, first), other[last]]


def harder(maker: Maker, rows: Dataset) -> Dataset:
    """The rows, a share of each domain's rewritten to be harder. One that is never rewritten stays as it is."""
    places: dict[str, list[int]] = {name: [] for name in maker.recipe.domains}
    for i, name in enumerate(rows["domain"][:]):
        places[name].append(i)
    chosen = []
    for name, own in places.items():
        rng = random.Random(f"{maker.recipe.seed} harder {name}")
        chosen += rng.sample(own, round(maker.recipe.domains[name].harder * len(own)))
    found = collect(maker, "harder", rows.select(chosen))
    rewritten = {i: {"instruction": f[0], "kind": "harder"} for i, f in zip(chosen, found, strict=True) if f}
    return _table([row | rewritten.get(i, {}) for i, row in enumerate(rows.to_list())])


def answers(maker: Maker, rows: Dataset) -> Dataset:
    """The conversations, with answers to their last questions. A question that is never answered is taken out."""
    talks = rows.to_list()
    asking = [i for i, talk in enumerate(talks) if talk["messages"][-1]["role"] == "user"]
    for i, found in zip(asking, collect(maker, "answers", rows.select(asking)), strict=True):
        if found:
            talks[i]["messages"].append({"role": "assistant", "content": found[0]})
        else:
            talks[i]["messages"].pop()
    return _table([talk for talk in talks if talk["messages"]], CONVERSATIONS)


def turns(maker: Maker, rows: Dataset, turn: int) -> Dataset:
    """The conversations, with one more question by a simulated user where their domain wants so many."""
    talks, asked = rows.to_list(), 2 * (turn - 1)
    more = {name for name, domain in maker.recipe.domains.items() if domain.turns >= turn}
    wanting = [i for i, talk in enumerate(talks) if talk["domain"] in more and len(talk["messages"]) == asked]
    for i, found in zip(wanting, collect(maker, "turns", rows.select(wanting)), strict=True):
        talks[i]["messages"] += [{"role": "user", "content": text} for text in found]
    return _table(talks, CONVERSATIONS)


def conversations(maker: Maker, rows: Dataset) -> Iterator[dict]:
    """A record for each instruction that is answered, until the teacher stops."""
    recipe = maker.recipe
    for start in range(0, len(rows), BLOCK):
        block = rows.select(range(start, min(start + BLOCK, len(rows))))
        asked = [row | {"messages": [{"role": "user", "content": row["instruction"]}]} for row in block.to_list()]
        talks = answers(maker, _table(asked, CONVERSATIONS))
        for turn in range(2, max(domain.turns for domain in recipe.domains.values()) + 1):
            talks = answers(maker, turns(maker, talks, turn))
        yield from (row | {"source": recipe.source, "licence": recipe.licence} for row in talks.to_list())
        if maker.teacher.stopped:
            return


STEPS = (meta_topics, sub_topics, instructions, expansion, skill_pairs, harder)


def all_instructions(maker: Maker, keep: Callable[[str, Dataset], None] = lambda name, rows: None) -> Dataset | None:
    """Follows all steps up to the answers. Each one's rows are given to `keep`. None if the teacher stopped."""
    rows = domains(maker)
    for step in STEPS:
        rows = step(maker, rows)
        if maker.teacher.stopped:
            return None
        keep(step.__name__, rows)
    return rows
