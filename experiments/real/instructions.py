"""Questions that ask for prose, and instructions about its form that code can check."""

import re
from collections.abc import Callable
from random import Random

from experiments.real.splitting import draw


_TOPICS = (
    "the sea|mountains|dogs|cats|the moon|bread|coffee|trees|winter|summer|music|painting|the piano|chess|football|rivers|"
    "bees|birds|horses|elephants|volcanoes|deserts|rain|clouds|gardens|libraries|trains|bicycles|ships|bridges|castles|"
    "museums|farming|cooking|tea|chocolate|honey|cheese|gold|glass|paper|books|letters|dreams|friendship|patience|"
    "courage|sleep|running|swimming|dancing|photography|theatre|cinema|poetry|history|the Roman Empire|ancient Egypt|"
    "the Renaissance|the printing press|the telephone|electricity|magnetism|gravity|light|sound|heat|water|ice|the sun|"
    "stars|planets|Mars|the ocean floor|whales|sharks|penguins|bears|wolves|foxes|rabbits|butterflies|spiders|ants|"
    "roses|oaks|apples|rice|wheat|salt|pepper|France|Italy|Japan|Brazil|Kenya|India|Canada|Norway|Paris|London|Rome|"
    "Tokyo|New York|schools|teachers|doctors|nurses|bakers|sailors|pilots|astronauts|inventors|markets|money|trade|"
    "cities|villages|forests|islands|caves|lakes|the wind|thunder|rainbows|snow|spring|autumn|night|morning|time|memory|"
    "language|stories|myths|heroes|games|toys|families|neighbours|holidays|travel|maps|the compass|clocks|the wheel|"
    "medicine|vaccines|the heart|the brain|bones|muscles|teeth|vision|hearing|taste|exercise|healthy food|kindness"
)
TOPICS = _TOPICS.split("|")
PROSE = [
    "Tell me about {}.",
    "What should I know about {}?",
    "Write a short paragraph about {}.",
    "Why do people care about {}?",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Give me three facts about {}.",
    "Describe {} in a few sentences.",
    "What is interesting about {}?",
    "Write a friendly letter about {}.",
    "How would you introduce {} in a speech?",
    "What do you think about when you hear of {}?",
]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def prose_questions(seed: int, count: int, wanted: bool) -> list[str]:
    """Different questions about topics; `wanted` is True for the held-out part, whose topics are others."""
    random = Random(f"prose {seed} {wanted}")
    found: dict[str, None] = {}
    while len(found) < count:
        topic = draw(_topic, random, wanted)
        found[random.choice(PROSE).format(topic)] = None
    return list(found)


def _topic(random: Random) -> tuple[tuple, str]:
    topic = random.choice(TOPICS)
    return ("topic", topic), topic


def words(reply: str) -> list[str]:
    """Its words."""
    return re.findall(r"[A-Za-z0-9'-]+", reply)


def sentences(reply: str) -> int:
    """Counts its sentences."""
    return len(re.findall(r"[^.!?]+[.!?]+", reply))


def bullets(reply: str) -> int:
    """Counts lines that begin with a bullet."""
    return len(re.findall(r"^\s*[-*•]\s+\S", reply, re.MULTILINE))


def numbered(reply: str) -> int:
    """Counts lines that begin with a number."""
    return len(re.findall(r"^\s*\d+[.)]\s+\S", reply, re.MULTILINE))


# name: (what the user adds, with n for a number and w for a word; whether a reply keeps to it)
CONSTRAINTS: dict[str, tuple[str, Callable[[str, int, str], bool]]] = {
    "lower case": ("Use lower case letters only.", lambda r, n, w: r == r.lower()),
    "upper case": ("Write everything in capital letters.", lambda r, n, w: r == r.upper()),
    "no commas": ("Do not use any commas.", lambda r, n, w: "," not in r),
    "word": ("Use the word '{w}'.", lambda r, n, w: w in r.lower()),
    "not word": ("Do not use the word '{w}'.", lambda r, n, w: w not in map(str.lower, words(r))),
    "first word": ("Begin with the word '{w}'.", lambda r, n, w: words(r)[:1] and words(r)[0].lower() == w),
    "bullets": ("Answer with exactly {number} bullet points, each on a line that begins with '- '.", lambda r, n, w: bullets(r) == n),
    "numbered": ("Answer with a numbered list of exactly {number} items.", lambda r, n, w: numbered(r) == n),
    "one sentence": ("Answer in one sentence.", lambda r, n, w: sentences(r) == 1),
    "few words": ("Use at most {tens} words.", lambda r, n, w: len(words(r)) <= 10 * n),
    "ending": ("End with the words 'Thank you.'", lambda r, n, w: r.rstrip().endswith("Thank you.")),
    "question": ("End with a question mark.", lambda r, n, w: r.rstrip().endswith("?")),
    "title": ("Begin with a title in double square brackets, like [[title]].", lambda r, n, w: bool(re.match(r"\s*\[\[.+?\]\]", r))),
}  # fmt: skip
WORDS = ["bright", "river", "simple", "often", "small", "people", "never", "always", "quiet", "strong"]


def instructions(seed: int, count: int, wanted: bool = True) -> list[dict]:
    """Different questions with one constraint each, as rows that `kept` can check."""
    random = Random(f"instructions {seed} {wanted}")
    rows: dict[str, dict] = {}
    while len(rows) < count:
        (question,) = prose_questions(random.randrange(10**9), 1, wanted)
        kind, n, word = random.choice(list(CONSTRAINTS)), random.choice(list(NUMBERS)), random.choice(WORDS)
        asked = CONSTRAINTS[kind][0].format(w=word, number=NUMBERS[n], tens=10 * n)
        question = f"{question} {asked}"
        rows[question] = {"kind": kind, "question": question, "number": n, "word": word}
    return list(rows.values())


def kept(row: dict, reply: str) -> bool:
    """Tells whether a reply keeps to the constraint of its row. An empty reply keeps to none."""
    return bool(reply.strip()) and bool(CONSTRAINTS[row["kind"]][1](reply, row["number"], row["word"]))
