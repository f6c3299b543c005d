"""Small functions to write, with tests: lists of numbers, strings, whole numbers, dictionaries.

A task is a sentence, a reference function, and calls whose results the reference says. Most are put together from parts
(which numbers, what of them, how they are joined), and whole combinations are held out.
"""

import copy
from random import Random
from typing import NamedTuple

from experiments.real.splitting import draw


class Task(NamedTuple):
    """A function to write.

    Attributes:
        kind: Which sort of task.
        question: What the user asks.
        code: The reference function.
        tests: Assertions on a function of that name.
    """

    kind: str
    question: str
    code: str
    tests: list[str]


# what is kept: (words, condition on x, helps of a number k)
KEPT = [
    ("all numbers", None),
    ("the even numbers", "x % 2 == 0"),
    ("the odd numbers", "x % 2 == 1"),
    ("the positive numbers", "x > 0"),
    ("the negative numbers", "x < 0"),
    ("the numbers greater than {k}", "x > {k}"),
    ("the numbers less than {k}", "x < {k}"),
    ("the numbers divisible by {k}", "x % {k} == 0"),
    ("the numbers not divisible by {k}", "x % {k} != 0"),
    ("the numbers between -{k} and {k}", "-{k} <= x <= {k}"),
]
CHANGED = [
    ("", "x"),
    ("the squares of ", "x * x"),
    ("the cubes of ", "x ** 3"),
    ("the absolute values of ", "abs(x)"),
    ("the doubles of ", "2 * x"),
    ("the halves of ", "x / 2"),
    ("the negatives of ", "-x"),
]
JOINED = [
    ("the sum of {}", "sum({})", "total = 0", "total += {}", "total"),
    ("the product of {}", None, "result = 1", "result *= {}", "result"),
    ("a list of {}", "[{}]", "result = []", "result.append({})", "result"),
    ("a sorted list of {}", "sorted({})", None, None, None),
    ("the largest of {}, or None if there are none", "max([{}], default=None)", None, None, None),
    ("the smallest of {}, or None if there are none", "min([{}], default=None)", None, None, None),
    ("how many different values {} have", "len(set({}))", None, None, None),
    ("the set of {}", "set({})", None, None, None),
]
LISTS = [[1, 2, 3, 4, 5, 6], [], [-3, 7, 0, 12, -8], [10, 15, 20, 33], [2, 2, -5, 9, 4, 4]]
ARGUMENTS = ["numbers", "values", "nums", "items", "data"]
ASK = [
    "Write a Python function `{signature}` that returns {what}.",
    "Write a function `{signature}` in Python. It returns {what}.",
    "Implement `{signature}`, which returns {what}.",
    "Please write a Python function called `{name}` that takes {takes} and returns {what}.",
]


def on_numbers(random: Random) -> tuple[tuple, Task]:
    """Some numbers of a list, changed and joined."""
    kept, changed, joined = random.choice(KEPT), random.choice(CHANGED), random.choice(JOINED)
    k, argument = random.choice([2, 3, 4, 5, 7, 10]), random.choice(ARGUMENTS)
    what = joined[0].format(changed[0] + kept[0].format(k=k) + " in a list")
    condition = kept[1] and kept[1].format(k=k)
    name = random.choice(["solve", "compute", "process", "f", _name(what)])
    if joined[1] is None or joined[2] and random.random() < 0.4:
        body = _loop(joined, changed[1], condition, argument)
    else:
        each = f"{changed[1]} for x in {argument}" + (f" if {condition}" if condition else "")
        body = [f"return {joined[1].format(each)}"] if changed[1] != "x" or condition else _plain(joined[1], argument)
    content = ("numbers", kept[0], changed[0], joined[0])
    return content, _task("numbers", name, [argument], what, "a list of numbers", body, [[x] for x in LISTS], random)


def _plain(joined: str, argument: str) -> list[str]:
    """Nothing is left out and nothing changed: the list itself."""
    if joined == "[{}]":
        return [f"return list({argument})"]
    return [f"return {joined.replace('[{}]', '{}').format(argument)}"]


def _loop(joined, changed: str, condition: str | None, argument: str) -> list[str]:
    add = joined[3].format(changed)
    inner = [f"    if {condition}:", f"        {add}"] if condition else [f"    {add}"]
    return [joined[2], f"for x in {argument}:", *inner, f"return {joined[4]}"]


def _name(what: str) -> str:
    skipped = {"the", "of", "a", "all", "in", "how", "many", "have", "there", "are", "none", "or", "if", "and"}
    words = [w for w in what.replace(",", "").replace("-", "").lower().split() if w.isalpha() and w not in skipped]
    return "_".join(words[:4]) or "solve"


# (name, arguments, what it returns, what it takes, body, inputs)
TEXT = "a string"
TEXTS = [["hello world"], [""], ["A man a plan"], ["Python is Fun"], ["aaa bbb"]]
WORDS_LISTS = [[["apple", "fig", "banana"]], [[]], [["a", "bb", "ccc", "bb"]], [["Zoe", "adam", "Eve"]]]
SMALL = [[1], [5], [7], [10], [12]]
FIXED = [
    ("count_vowels", ["text"], "the number of vowels in a string", TEXT, ["return sum(1 for c in text.lower() if c in 'aeiou')"], TEXTS),
    ("reverse_string", ["text"], "the string reversed", TEXT, ["return text[::-1]"], TEXTS),
    ("reverse_words", ["text"], "the words of a string in reverse order", TEXT, ["return ' '.join(text.split()[::-1])"], TEXTS),
    ("count_words", ["text"], "the number of words in a string", TEXT, ["return len(text.split())"], TEXTS),
    ("longest_word", ["text"], "the longest word of a string, or an empty string", TEXT, ["return max(text.split(), key=len, default='')"], TEXTS),
    ("is_palindrome", ["text"], "whether a string reads the same backwards", TEXT, ["return text == text[::-1]"], [["abba"], [""], ["abc"], ["level"]]),
    ("remove_spaces", ["text"], "the string without spaces", TEXT, ["return text.replace(' ', '')"], TEXTS),
    ("remove_vowels", ["text"], "the string without vowels", TEXT, ["return ''.join(c for c in text if c.lower() not in 'aeiou')"], TEXTS),
    ("capitalize_words", ["text"], "the string with the first letter of every word in upper case", TEXT, ["return ' '.join(w[:1].upper() + w[1:] for w in text.split(' '))"], TEXTS),
    ("swap_case", ["text"], "the string with upper and lower case exchanged", TEXT, ["return text.swapcase()"], TEXTS),
    ("first_letters", ["text"], "the first letters of all words, joined", TEXT, ["return ''.join(w[0] for w in text.split())"], TEXTS),
    ("count_upper", ["text"], "the number of upper case letters", TEXT, ["return sum(1 for c in text if c.isupper())"], TEXTS),
    ("letter_counts", ["text"], "a dictionary from each character to how often it occurs", TEXT, ["counts = {}", "for c in text:", "    counts[c] = counts.get(c, 0) + 1", "return counts"], TEXTS),
    ("unique_chars", ["text"], "the characters of a string without repetitions, in order", TEXT, ["return ''.join(dict.fromkeys(text))"], TEXTS),
    ("total_length", ["words"], "the total length of all words in a list", "a list of strings", ["return sum(len(w) for w in words)"], WORDS_LISTS),
    ("word_lengths", ["words"], "a list of the lengths of the words", "a list of strings", ["return [len(w) for w in words]"], WORDS_LISTS),
    ("length_by_word", ["words"], "a dictionary from each word to its length", "a list of strings", ["return {w: len(w) for w in words}"], WORDS_LISTS),
    ("sort_by_length", ["words"], "the words sorted by length", "a list of strings", ["return sorted(words, key=len)"], WORDS_LISTS),
    ("upper_words", ["words"], "the words in upper case", "a list of strings", ["return [w.upper() for w in words]"], WORDS_LISTS),
    ("join_words", ["words"], "the words joined by commas", "a list of strings", ["return ','.join(words)"], WORDS_LISTS),
    ("factorial", ["n"], "the factorial of n", "an integer", ["result = 1", "for i in range(2, n + 1):", "    result *= i", "return result"], SMALL),
    ("fibonacci", ["n"], "the n-th Fibonacci number, with fibonacci(1) = fibonacci(2) = 1", "an integer", ["a, b = 0, 1", "for _ in range(n):", "    a, b = b, a + b", "return a"], SMALL),
    ("is_prime", ["n"], "whether n is a prime number", "an integer", ["if n < 2:", "    return False", "for i in range(2, int(n ** 0.5) + 1):", "    if n % i == 0:", "        return False", "return True"], [[1], [2], [9], [17], [21]]),
    ("divisors", ["n"], "a list of all divisors of n", "an integer", ["return [i for i in range(1, n + 1) if n % i == 0]"], SMALL),
    ("digit_sum", ["n"], "the sum of the digits of n", "an integer", ["return sum(int(d) for d in str(n))"], [[0], [7], [123], [9999]]),
    ("count_digits", ["n"], "the number of digits of n", "an integer", ["return len(str(n))"], [[0], [7], [123], [9999]]),
    ("sum_to", ["n"], "the sum of all integers from 1 to n", "an integer", ["return n * (n + 1) // 2"], SMALL),
    ("sum_of_squares", ["n"], "the sum of the squares of all integers from 1 to n", "an integer", ["return sum(i * i for i in range(1, n + 1))"], SMALL),
    ("is_even", ["n"], "whether n is even", "an integer", ["return n % 2 == 0"], SMALL),
    ("to_binary", ["n"], "the binary digits of n as a string", "an integer", ["return bin(n)[2:]"], SMALL),
    ("collatz_steps", ["n"], "how many Collatz steps lead from n to 1", "an integer", ["steps = 0", "while n != 1:", "    n = n // 2 if n % 2 == 0 else 3 * n + 1", "    steps += 1", "return steps"], SMALL),
    ("gcd", ["a", "b"], "the greatest common divisor of a and b", "two integers", ["while b:", "    a, b = b, a % b", "return a"], [[12, 18], [7, 5], [100, 75]]),
    ("lcm", ["a", "b"], "the least common multiple of a and b", "two integers", ["x, y = a, b", "while y:", "    x, y = y, x % y", "return a * b // x"], [[12, 18], [7, 5], [4, 6]]),
    ("power", ["base", "exponent"], "base to the power of exponent", "two integers", ["return base ** exponent"], [[2, 10], [5, 0], [3, 3]]),
    ("larger", ["a", "b"], "the larger of a and b", "two numbers", ["return a if a > b else b"], [[1, 2], [5, 5], [9, -3]]),
    ("average", ["numbers"], "the average of a list of numbers, or 0 if it is empty", "a list of numbers", ["return sum(numbers) / len(numbers) if numbers else 0"], [[x] for x in LISTS]),
    ("median", ["numbers"], "the median of a list of numbers", "a list of numbers", ["ordered = sorted(numbers)", "middle = len(ordered) // 2", "if len(ordered) % 2:", "    return ordered[middle]", "return (ordered[middle - 1] + ordered[middle]) / 2"], [[[1, 3, 2]], [[4, 1, 2, 3]], [[5]]]),
    ("second_largest", ["numbers"], "the second largest different number of a list", "a list of numbers", ["return sorted(set(numbers))[-2]"], [[[1, 3, 2]], [[4, 4, 2, 3]], [[5, 6]]]),
    ("unique", ["items"], "the items of a list without repetitions, in order", "a list", ["result = []", "for x in items:", "    if x not in result:", "        result.append(x)", "return result"], [[x] for x in LISTS]),
    ("flatten", ["lists"], "one list with all items of a list of lists", "a list of lists", ["return [x for inner in lists for x in inner]"], [[[[1, 2], [3]]], [[]], [[[], [4, 5]]]]),
    ("running_sum", ["numbers"], "a list of the running sums", "a list of numbers", ["result, total = [], 0", "for x in numbers:", "    total += x", "    result.append(total)", "return result"], [[x] for x in LISTS]),
    ("differences", ["numbers"], "a list of the differences of neighbours", "a list of numbers", ["return [b - a for a, b in zip(numbers, numbers[1:])]"], [[x] for x in LISTS]),
    ("common_items", ["a", "b"], "a sorted list of the items that are in both lists", "two lists", ["return sorted(set(a) & set(b))"], [[[1, 2, 3], [2, 3, 4]], [[], [1]], [[5, 5], [5]]]),
    ("dot_product", ["a", "b"], "the sum of the products of the items at the same position", "two lists of numbers", ["return sum(x * y for x, y in zip(a, b))"], [[[1, 2, 3], [2, 3, 4]], [[], []], [[5], [-2]]]),
    ("is_sorted", ["numbers"], "whether a list is in ascending order", "a list of numbers", ["return all(a <= b for a, b in zip(numbers, numbers[1:]))"], [[x] for x in LISTS]),
    ("invert", ["mapping"], "a dictionary with keys and values exchanged", "a dictionary", ["return {value: key for key, value in mapping.items()}"], [[{"a": 1, "b": 2}], [{}]]),
    ("sum_values", ["mapping"], "the sum of all values of a dictionary", "a dictionary", ["return sum(mapping.values())"], [[{"a": 1, "b": 2}], [{}]]),
    ("key_of_largest", ["mapping"], "the key with the largest value", "a dictionary", ["return max(mapping, key=mapping.get)"], [[{"a": 1, "b": 2}], [{"x": 9, "y": 3}]]),
    ("merge", ["a", "b"], "a dictionary with the items of both, where b wins", "two dictionaries", ["result = dict(a)", "result.update(b)", "return result"], [[{"a": 1}, {"a": 2, "b": 3}], [{}, {"x": 1}]]),
    ("count_items", ["items"], "a dictionary from each item to how often it occurs", "a list", ["counts = {}", "for x in items:", "    counts[x] = counts.get(x, 0) + 1", "return counts"], [[x] for x in LISTS]),
]  # fmt: skip
# (name, what, body, numbers k): of a list of numbers or a string, with a number inside
WITH_NUMBER = [
    ("first_items", "the first {k} items of a list", "a list", ["return items[:{k}]"], "items", LISTS),
    ("last_items", "the last {k} items of a list", "a list", ["return items[-{k}:]"], "items", LISTS),
    ("every_kth", "every {k}. item of a list, beginning with the first", "a list", ["return items[::{k}]"], "items", LISTS),
    ("without_first", "a list without its first {k} items", "a list", ["return items[{k}:]"], "items", LISTS),
    ("add_to_all", "a list with {k} added to every number", "a list of numbers", ["return [x + {k} for x in items]"], "items", LISTS),
    ("times_all", "a list with every number multiplied by {k}", "a list of numbers", ["return [x * {k} for x in items]"], "items", LISTS),
    ("remainders", "the remainders of all numbers divided by {k}", "a list of numbers", ["return [x % {k} for x in items]"], "items", LISTS),
    ("count_above", "how many numbers are greater than {k}", "a list of numbers", ["return sum(1 for x in items if x > {k})"], "items", LISTS),
    ("contains", "whether a list contains the number {k}", "a list of numbers", ["return {k} in items"], "items", LISTS),
    ("chunks", "a list of pieces of {k} items each, the last may be shorter", "a list", ["return [items[i:i + {k}] for i in range(0, len(items), {k})]"], "items", LISTS),
    ("repeat_text", "the string repeated {k} times", TEXT, ["return text * {k}"], "text", [t for (t,) in TEXTS]),
    ("first_chars", "the first {k} characters of a string", TEXT, ["return text[:{k}]"], "text", [t for (t,) in TEXTS]),
    ("long_words", "the words of a string with more than {k} letters, as a list", TEXT, ["return [w for w in text.split() if len(w) > {k}]"], "text", [t for (t,) in TEXTS]),
    ("every_kth_char", "every {k}. character of a string, beginning with the first", TEXT, ["return text[::{k}]"], "text", [t for (t,) in TEXTS]),
]  # fmt: skip


def fixed(random: Random) -> tuple[tuple, Task]:
    """A well-known small function."""
    name, arguments, what, takes, body, inputs = random.choice(FIXED)
    called = random.choice([name, name, name, "solve", "f"]) if f"{name}(" not in what else name
    return ("fixed", name), _task("known", called, arguments, what, takes, body, inputs, random)


def with_number(random: Random) -> tuple[tuple, Task]:
    """A small function with a number inside."""
    name, what, takes, body, argument, inputs = random.choice(WITH_NUMBER)
    k = random.randint(2, 9)
    body = [line.format(k=k) for line in body]
    task = _task("with a number", random.choice([name, "solve", "f"]), [argument], what.format(k=k), takes, body, [[x] for x in inputs], random)  # fmt: skip
    return ("with a number", name, k), task


def _task(
    kind: str, name: str, arguments: list[str], what: str, takes: str, body: list[str], inputs: list, random: Random
):
    signature = f"{name}({', '.join(arguments)})"
    code = "\n".join([f"def {signature}:", *(f"    {line}" for line in body)])
    tests = [f"assert {call} == {value!r}" for call, value in results(code, name, inputs)]
    if random.random() < 0.3:
        call, value = results(code, name, inputs)[0]
        doc = f'    """Return {what}.\n\n    >>> {call}\n    {value!r}\n    """'
        question = f"Complete this Python function:\n\n```python\ndef {signature}:\n{doc}\n```"
    else:
        question = random.choice(ASK).format(signature=signature, name=name, what=what, takes=takes)
    return Task(kind, question, code, tests)


def results(code: str, name: str, inputs: list[list]) -> list[tuple[str, object]]:
    """Returns the reference function's result for each input."""
    space: dict = {}
    exec(code, space)  # our own text
    calls = [f"{name}({', '.join(map(repr, arguments))})" for arguments in inputs]
    return [(call, space[name](*copy.deepcopy(a))) for call, a in zip(calls, inputs, strict=True)]


KINDS = {on_numbers: 5, fixed: 3, with_number: 2}


def training_tasks(seed: int, count: int) -> list[Task]:
    """Tasks of all kinds, none of the held-out part."""
    random = Random(f"code {seed}")
    kinds = random.choices(list(KINDS), list(KINDS.values()), k=count)
    return [draw(kind, random, wanted=False) for kind in kinds]


def held_out_tasks(seed: int, count: int) -> list[Task]:
    """Different tasks of the held-out part, all kinds."""
    random = Random(f"code held out {seed}")
    drawn: dict[str, Task] = {}
    while len(drawn) < count:
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        one = draw(kind, random, wanted=True)
        drawn.setdefault(one.code.split(":", 1)[1], one)
    return list(drawn.values())
