"""Exact arithmetic with worked steps: products, sums, differences, linear equations, word problems.

Every answer ends in a line `Answer: NUMBER`. The steps are such that each new number follows from two that stand there
already: a product of two-digit numbers is four products of digits and three sums.
"""

import re
from random import Random
from typing import NamedTuple

from experiments.real.splitting import draw


class Item(NamedTuple):
    """A question with its worked answer.

    Attributes:
        kind: Which task.
        question: What the user asks.
        steps: The worked answer, whose last line is `Answer: ...`.
        answer: What stands behind `Answer: `.
    """

    kind: str
    question: str
    steps: str
    answer: str


ASK = ["What is {}?", "Calculate {}.", "{}", "{} = ?", "Compute {}.", "How much is {}?", "Work out {} step by step."]
NAMES = [
    "Tom",
    "Anna",
    "Ben",
    "Mia",
    "Sam",
    "Eva",
    "Leo",
    "Zoe",
    "Max",
    "Ida",
    "Raj",
    "Lin",
    "Omar",
    "Sara",
    "Paul",
    "Nora",
]
THINGS = [
    "apples",
    "pens",
    "cards",
    "books",
    "coins",
    "stamps",
    "eggs",
    "cups",
    "bricks",
    "tickets",
    "oranges",
    "marbles",
]


def item(kind: str, question: str, steps: list[str], answer: int) -> Item:
    """An item whose last line says the answer."""
    return Item(kind, question, "\n".join([*steps, f"Answer: {answer}"]), str(answer))


def product_steps(a: int, b: int) -> list[str]:
    """A product of two numbers under 100, by tens and ones of both."""
    if b < 10 and a < 10:
        return [f"{a}*{b}={a * b}"]
    if b < 10:
        return [_part(a, b)]
    tens, ones = b // 10 * 10, b % 10
    if not ones:
        return [_part(a, b)]
    if a < 10:
        return product_steps(b, a)
    return [f"{a}*{b}={a}*{tens}+{a}*{ones}", _part(a, tens), _part(a, ones), f"{a * tens}+{a * ones}={a * b}"]


def _part(a: int, b: int) -> str:
    tens, ones = a // 10 * 10, a % 10
    if not (tens and ones):
        return f"{a}*{b}={a * b}"
    return f"{a}*{b}={tens * b}+{ones * b}={a * b}"


def product(random: Random, low: int = 10, high: int = 99) -> tuple[tuple, Item]:
    """Two-digit multiplication."""
    a, b = random.randint(low, high), random.randint(low, high)
    sign = random.choice(["*", "*", " * ", " x ", " times ", "×"])
    question = random.choice(ASK).format(f"{a}{sign}{b}")
    return ("product", *sorted((a, b))), item("product", question, product_steps(a, b), a * b)


def small_product(random: Random) -> tuple[tuple, Item]:
    """Multiplication by one digit."""
    a, b = random.randint(2, 99), random.randint(2, 9)
    question = random.choice(ASK).format(f"{a}*{b}")
    return ("product", *sorted((a, b))), item("small product", question, product_steps(a, b), a * b)


def addition_steps(a: int, b: int) -> list[str]:
    """Digits from the right, each with what is carried."""
    steps, carry = [], 0
    for x, y in zip(*_digits(a, b), strict=True):
        total = x + y + carry
        steps.append(f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}")
        carry = total // 10
    return steps


def subtraction_steps(a: int, b: int) -> list[str]:
    """Digits from the right; what was borrowed is added to the digit that is taken away."""
    steps, borrow = [], 0
    for x, y in zip(*_digits(a, b), strict=True):
        y, borrow = y + borrow, int(x < y + borrow)
        steps.append(f"{x + 10 * borrow}-{y}={x + 10 * borrow - y}")
    return steps


def _digits(a: int, b: int) -> tuple[list[int], list[int]]:
    width = max(len(str(a)), len(str(b)))
    return [int(d) for d in reversed(f"{a:0{width}}")], [int(d) for d in reversed(f"{b:0{width}}")]


def addition(random: Random) -> tuple[tuple, Item]:
    """Sums of numbers of three to five digits."""
    a, b = _large(random), _large(random)
    sign = random.choice(["+", "+", " + ", " plus "])
    question = random.choice(ASK).format(f"{a}{sign}{b}")
    return ("sum", *sorted((a, b))), item("addition", question, addition_steps(a, b), a + b)


def subtraction(random: Random) -> tuple[tuple, Item]:
    """Differences of numbers of three to five digits."""
    b, a = sorted((_large(random), _large(random)))
    sign = random.choice(["-", "-", " - ", " minus "])
    question = random.choice(ASK).format(f"{a}{sign}{b}")
    return ("difference", a, b), item("subtraction", question, subtraction_steps(a, b), a - b)


def _large(random: Random) -> int:
    digits = random.randint(3, 5)
    return random.randint(10 ** (digits - 1), 10**digits - 1)


def equation(random: Random) -> tuple[tuple, Item]:
    """Linear equations in one unknown with a whole solution."""
    a, x, b = random.randint(2, 12), random.randint(1, 20), random.randint(1, 60)
    name, plus = random.choice("xyznabk"), random.random() < 0.5
    right = a * x + b if plus else a * x - b
    left = f"{a}*{name} {'+' if plus else '-'} {b}"
    if right < 0:
        return equation(random)
    ask = random.choice(["Solve {} = {} for {}.", "Find {2} if {0} = {1}.", "{} = {}. What is {}?"])
    steps = [f"{a}*{name} = {right} {'-' if plus else '+'} {b} = {a * x}", f"{name} = {a * x}/{a} = {x}"]
    return ("equation", a, b, x, plus), item("equation", ask.format(left, right, name), steps, x)


def word_problem(random: Random) -> tuple[tuple, Item]:
    """One or two steps in words."""
    make = random.choice(WORDS)
    numbers, question, steps, answer = make(random, random.choice(NAMES), random.choice(THINGS))
    content = ("product", *sorted(numbers)) if make is boxes else ("words", make.__name__, *numbers)
    return content, item("word problem", question, steps, answer)


def boxes(random: Random, who: str, what: str):
    """A product."""
    a, b = random.randint(11, 48), random.randint(3, 40)
    text = random.choice(
        [
            f"A box holds {a} {what}. How many {what} are in {b} boxes?",
            f"{who} packs {b} boxes with {a} {what} each. How many {what} is that?",
            f"There are {b} shelves with {a} {what} on each. How many {what} are there?",
        ]
    )
    return (a, b), text, product_steps(a, b), a * b


def bags_and_more(random: Random, who: str, what: str):
    """A product and a sum."""
    start, a, b = random.randint(5, 60), random.randint(11, 30), random.randint(2, 9)
    text = random.choice(
        [
            f"{who} has {start} {what} and buys {b} bags of {a} {what} each. How many {what} does {who} have now?",
            f"{who} owns {start} {what}. Then {who} gets {b} packs with {a} {what} in each. How many {what} in all?",
        ]
    )
    return (start, a, b), text, [*product_steps(a, b), f"{start}+{a * b}={start + a * b}"], start + a * b


def money_left(random: Random, who: str, what: str):
    """A product and a difference."""
    a, b = random.randint(2, 9), random.randint(2, 9)
    start = a * b + random.randint(1, 50)
    text = random.choice(
        [
            f"{who} has {start} dollars and buys {b} {what} for {a} dollars each. How many dollars are left?",
            f"One of the {what} costs {a} dollars. {who} buys {b} of them and pays with {start} dollars. "
            f"How much change does {who} get?",
        ]
    )
    return (start, a, b), text, [f"{a}*{b}={a * b}", f"{start}-{a * b}={start - a * b}"], start - a * b


def shared(random: Random, who: str, what: str):
    """A quotient."""
    a, b = random.randint(2, 12), random.randint(2, 12)
    text = f"{who} shares {a * b} {what} equally among {b} friends. How many {what} does each friend get?"
    return (a, b), text, [f"{a * b}/{b}={a}"], a


def given_away(random: Random, who: str, what: str):
    """A sum and a difference."""
    start, more = random.randint(20, 90), random.randint(5, 60)
    less = random.randint(3, start)
    text = f"{who} has {start} {what}. {who} gives away {less} and then finds {more} more. How many {what} does {who} have?"
    return (
        (start, less, more),
        text,
        [f"{start}-{less}={start - less}", f"{start - less}+{more}={start - less + more}"],
        (start - less + more),
    )


def program_lines(word_problem: Item) -> list[str]:
    """The body of a Python function that returns the answer of a word problem."""
    lefts = [line.split("=")[0] for line in word_problem.steps.splitlines()[:-1]]
    first, last = lefts[0], lefts[-1]
    a, sign, b = re.fullmatch(r"(\d+)([*+/-])(\d+)", first).groups()
    value = {"*": int(a) * int(b), "+": int(a) + int(b), "-": int(a) - int(b), "/": int(a) // int(b)}[sign]
    if str(value) == word_problem.answer and sign in "*/":
        return [f"return {a} {sign.replace('/', '//')} {b}"]
    return [f"x = {a} {sign} {b}", "return " + re.sub(rf"\b{value}\b", "x", last, count=1)]


WORDS = [boxes, bags_and_more, money_left, shared, given_away]
KINDS = {  # how often each is drawn
    product: 8,
    small_product: 2,
    addition: 2,
    subtraction: 2,
    equation: 3,
    word_problem: 4,
}


def training_items(seed: int, count: int) -> list[Item]:
    """Items of all kinds, none of the held-out part."""
    random = Random(seed)
    kinds = random.choices(list(KINDS), list(KINDS.values()), k=count)
    return [draw(kind, random, wanted=False) for kind in kinds]


def held_out_items(seed: int, count: int) -> list[Item]:
    """As many different items of each kind, all of the held-out part."""
    random = Random(f"held out {seed}")
    items = []
    for kind in KINDS:
        drawn: dict[str, Item] = {}
        while len(drawn) < count:
            one = draw(kind, random, wanted=True)
            drawn.setdefault(one.question, one)
        items.extend(drawn.values())
    return items
