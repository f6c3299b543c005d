"""Equalities in a text: false ones are found, and nothing is evaluated."""

import pytest

from ultrafuser.data.arithmetic import NotUnderstood, parse, wrong_arithmetic


def says(answer, question="What is this?", domain="text"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain, "topic": "", "source": "here", "licence": "mit"}


HOLDS = [
    "3 + 4 = 7",
    "24 + (3 - 1)*2 = 24 + 4 = 28",
    "10/3 = 3.33",
    "22/7 = 3.14",
    "0.333 * 300 = 100",
    "1,200 + 300 = 1,500",
    "Total: $3 \\times 4 = 12$.",
    "$$\\frac{1}{2} + \\frac{1}{3} = \\frac{5}{6}$$",
    "He eats 3*4=<<3*4=12>>12 eggs",
    "6.02 * 10^23 * 2 = 1.204 * 10^24",
    "**3 + 4 = 7**",
    "3 x 4 = 12",
    "3² + 1 = 10",
    "x = 6/3 = 2",
    "Expand it.\n(x + 1)**2 = x**2 + 2*x + 1",
]


NOT_JUDGED = [
    "- 3 + 4 = 7",
    "1. 3 + 4 = 7",
    "20% of 50 = 10",
    "sqrt(16) + 4 = 8",
    "\\sqrt{16} + 4 = 8",
    "|−3| + 4 = 7",
    "3! + 4 = 10",
    "f(3) + 4 = 9",
    "C(5,2) + 1 = 11",
    "10 / 3 = 3 remainder 1",
    "7 + 8 = 3 (mod 12)",
    "17 % 5 + 1 = 3",
    "3:00 + 2 = 5",
    "(1, 2) + (3, 4) = (4, 6)",
    "101_2 + 1 = 110_2",
    "1 + 2 + ... + 10 = 55",
    "2 1/2 + 1 = 3.5",
    "2x + 3 = 7",
    "x^2 = 3x - 2",
    "6/2(1 + 2) = 1",
    "-3^2 + 1 = 10",
    "2 + 2 = 5 is wrong",
    "Is 2 + 2 = 5?",
    "```python\nassert 2 + 2 == 5\n```",
]


FALSE = [
    "3 + 4 = 8",
    "So we get 12 * 12 = 124.",
    "24 + 4 = 26 = 28",
    "10/3 = 3",
    "10/3 = 3.4",
    "12.50 * 4 = 51",
    "1,200 + 300 = 1,600",
    "Total: $3 \\times 4 = 13$.",
    "$$\\frac{1}{2} + \\frac{1}{3} = \\frac{2}{5}$$",
    "He eats 3*4=<<3*4=13>>13 eggs",
    "- 3 + 4 = 8",
    "x = 6/3 = 3",
    "3*x = 10 - 4 = 7",
    "2**3 = 9",
    "Expand it.\n(x + 1)**2 = x**2 + 3*x + 1",
    "Factor it: x**2 - 1 = (x - 1)(x + 2)",
]


@pytest.mark.parametrize("line", HOLDS + NOT_JUDGED)
def test_what_holds_or_is_not_surely_understood_stays(line):
    assert wrong_arithmetic(says(line)) is None


@pytest.mark.parametrize("line", FALSE)
def test_what_does_not_hold_is_dropped_with_the_equality(line):
    left, _, right = wrong_arithmetic(says(line)).partition(" = ")
    assert left
    assert right


@pytest.mark.parametrize(
    "text",
    ["9**9**9", "9^(9^9)", "(" * 50 + "1" + ")" * 50, "1" + "*9999999999" * 50, "1" * 1000, "1/0", "1/(2-2)", "0^-1"],
)
def test_what_is_too_large_or_no_number_is_refused_at_once(text):
    with pytest.raises(NotUnderstood):
        parse(text)


@pytest.mark.parametrize("text", ["(x+y)^25", "((x+1)^5)^6", "x/y", "2^x", "a*b*c*d", "__import__", "x.y", "f(x)"])
def test_of_letters_only_small_polynomials_are_understood(text):
    with pytest.raises(NotUnderstood):
        parse(text, sorted({c for c in text if c.isalpha()}))


def test_nothing_in_a_text_is_evaluated(tmp_path):
    trap = tmp_path / "trap"
    wrong_arithmetic(says(f"__import__('pathlib').Path('{trap}').touch() + 1 = 2\nopen('{trap}', 'w') = 1 + 1 = 2"))
    assert not trap.exists()
