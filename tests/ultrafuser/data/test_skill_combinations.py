"""Skills that meet in an instruction: more than two of them, and each combination once."""

import itertools

from tests.support.foreseen_teacher import AsForeseen
from tests.support.teacher_server import write_recipe
from ultrafuser.data.recipe import load_recipe
from ultrafuser.data.synthesis import Maker, all_instructions, nth_across, nth_combination


def test_three_skills_meet_and_no_three_twice(tmp_path):
    skills = {"number": 4, "together": 3, "pairs": 4, "across": 24}
    recipe = load_recipe(write_recipe(tmp_path, text__skills=skills, code__skills=dict(skills)))
    maker = Maker(recipe, AsForeseen())
    asked, ask = [], maker.teacher.ask
    maker.teacher.ask = lambda requests: asked.extend(requests) or ask(requests)
    rows = all_instructions(maker)
    for name in ("text", "code"):
        found = [row["skills"] for row in rows if row["domain"] == name and row["skills"]]
        own = {skill for three in found[:4] for skill in three}
        assert [len(own & set(three)) for three in found] == [3] * 4 + [2] * 24
        assert len({frozenset(three) for three in found}) == 28
    prompts = [request.messages[0]["content"] for request in asked if request.step == "pairs"]
    assert all("Here are three skills" in p and "who has all of them" in p for p in prompts)


def test_combinations_by_number_are_those_of_itertools():
    own, others = list("abcde"), [list("xy"), list("z")]
    for size in (1, 2, 3, 5):
        every = [list(found) for found in itertools.combinations(own, size)]
        assert [nth_combination(own, size, n) for n in range(len(every))] == every
    product = [[*two, last] for other in others for two in itertools.combinations(own, 2) for last in other]
    assert [nth_across(own, 2, others, n) for n in range(len(product))] == product
