import re

import pytest

from experiments.real import coding, functions, instructions, scoring, worked_arithmetic
from experiments.real.dataset import programmed
from experiments.real.parts import PARTS, first_of_each_kind
from experiments.real.splitting import held_out


ITEMS = worked_arithmetic.training_items(0, 600)
HELD_OUT = worked_arithmetic.held_out_items(0, 30)
TASKS = coding.training_tasks(0, 300)
EQUATION = re.compile(r"^\d[\d+*/-]*(=[\d+*/-]+)+$")


def factors(item):
    return tuple(sorted(map(int, re.findall(r"\d+", item.question))))


def test_every_worked_step_is_a_true_equation():
    lines = [line for item in ITEMS + HELD_OUT for line in item.steps.splitlines() if EQUATION.match(line)]
    assert len(lines) > 1000
    for line in lines:
        assert len({eval(side) for side in line.split("=")}) == 1, line


def test_the_last_line_is_the_answer_and_follows_from_the_question():
    products = [item for item in ITEMS if item.kind == "product"]
    for item in products:
        a, b = factors(item)
        assert item.steps.splitlines()[-1] == f"Answer: {a * b}"


def test_the_carry_goes_into_the_next_digit():
    assert worked_arithmetic.addition_steps(958, 67) == ["8+7=15", "5+6+1=12", "9+0+1=10"]
    assert worked_arithmetic.subtraction_steps(5032, 1847) == ["12-7=5", "13-5=8", "10-9=1", "5-2=3"]


def test_no_held_out_product_is_trained_in_any_order_or_in_words():
    asked = {factors(item) for item in HELD_OUT if item.kind == "product"}
    trained = {factors(item) for item in worked_arithmetic.training_items(1, 4000) if len(factors(item)) == 2}
    assert asked
    assert not asked & trained


def test_the_same_seed_gives_the_same_items():
    assert worked_arithmetic.training_items(0, 600) == ITEMS != worked_arithmetic.training_items(1, 600)


def test_every_reference_function_passes_its_tests():
    for task in TASKS:
        space = {}
        exec("\n".join([task.code, *task.tests]), space)


def test_no_held_out_combination_of_a_task_is_trained():
    def content(task):
        return re.sub(r"\d+", "k", re.sub(r"`.*?`", "", task.question.split("returns")[-1]))

    asked = {
        content(task) for task in coding.held_out_tasks(0, 60) if task.kind == "numbers" and "returns" in task.question
    }
    assert asked
    assert not asked & {content(task) for task in coding.training_tasks(1, 2000) if task.kind == "numbers"}


def test_a_function_that_needs_another_of_its_module_is_left_out(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        'def twice(x):\n    """Return two times the number x."""\n    y = x + x\n    return y\n\n\n'
        'def four(x):\n    """Return four times the number x."""\n    y = twice(x)\n    return twice(y)\n'
    )
    (task,) = functions.functions_of(file)
    assert task.code == "def twice(x):\n    y = x + x\n    return y"
    assert "Return two times the number x." in task.question


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("lower case", "the sea is wide.", "The sea is wide."),
        ("no commas", "Salt and water.", "Salt, and water."),
        ("bullets", "- a\n- b\n- c", "- a\n- b"),
        ("one sentence", "The sea is wide.", "The sea is wide. It is deep."),
        ("first word", "Bright is the sea.", "The bright sea."),
        ("ending", "The sea. Thank you.", "Thank you. The sea."),
        ("title", "[[Sea]] It is wide.", "Sea: it is wide."),
    ],
)
def test_a_constraint_tells_a_reply_that_keeps_to_it(kind, good, bad):
    row = {"kind": kind, "number": 3, "word": "bright"}
    assert instructions.kept(row, good)
    assert not instructions.kept(row, bad)
    assert not instructions.kept(row, " ")


def test_topics_of_held_out_questions_are_others():
    trained, asked = (instructions.prose_questions(0, 150, wanted) for wanted in (False, True))

    def topics(questions):
        return {topic for topic in instructions.TOPICS for question in questions if topic in question}

    exact = {topic for topic in instructions.TOPICS if held_out("topic", topic)}
    assert topics(asked) & exact
    assert not {q for q in trained if any(q == form.format(t) for form in instructions.PROSE for t in exact)}


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("6*7=42\nAnswer: 42", "42"), ("It is 1,692.", "1692"), ("Answer: x\nAnswer: 7.", "7"), ("no idea", "")],
)
def test_the_answer_is_behind_the_last_mark_or_the_last_number(reply, answer):
    assert scoring.said(reply) == answer


def test_a_program_is_run_with_its_tests():
    reply = "Here:\n```python\ndef f(x):\n    return x + 1\n```\nIt adds one."
    assert scoring.passes(reply, ["assert f(1) == 2"])
    assert not scoring.passes(reply, ["assert f(1) == 3"])


def test_the_program_of_a_word_problem_returns_its_answer():
    problems = [item for item in ITEMS if item.kind == "word problem"]
    assert len({item.question.split()[0] for item in problems}) > 5
    for item in problems:
        space = {}
        exec("\n".join(["def solve():", *(f"    {line}" for line in worked_arithmetic.program_lines(item))]), space)
        assert space["solve"]() == int(item.answer), item


def test_a_mixed_answer_is_right_if_its_program_and_its_number_are():
    row = programmed(next(item for item in ITEMS if item.kind == "word problem"))
    reply, wrong = row["messages"][1]["content"], f"Answer: {int(row['answer']) + 1}"
    assert PARTS["mixed"].check(row, reply) == {"right": True, "program": True, "number": True}
    assert PARTS["mixed"].check(row, reply.replace(f"Answer: {row['answer']}", wrong)) == {
        "right": False,
        "program": True,
        "number": False,
    }
    assert PARTS["mixed"].check(row, f"Answer: {row['answer']}") == {"right": False, "program": False, "number": True}


def test_the_first_of_each_kind_are_taken_in_order():
    rows = [{"kind": kind} for kind in "aababb"]
    assert first_of_each_kind(rows, 2) == [rows[i] for i in (0, 1, 2, 4)]
    assert first_of_each_kind(rows, None) == rows
