"""Tables of the study from made-up results whose numbers a reader can count."""

import json

import pytest

from experiments import real_figures
from experiments.real_averages import DOMAINS, results, right_specialist
from experiments.real_tables import verdict
from experiments.tables import TABLES


PARTS = ("products", "tasks", "constraints", "mixed")
# who solves which of the first four questions of each part; the base solves constraints, specialists their own
SOLVED = {
    "base": ("0000", "0000", "1111", "0000"),
    "math specialist": ("1111", "0000", "0000", "0001"),
    "code specialist": ("0000", "1111", "1100", "0011"),
    "merge, ties": ("1111", "1111", "1000", "1111"),
    "fused": ("1110", "1111", "1111", "0010"),
}
NATS = {"base": 3.0, "math specialist": 2.0, "code specialist": 2.0, "merge, ties": 1.0, "fused": 1.5}


def result(name, solved, *, seed=0, rows=(0, 1, 2, 3)):
    parts = {part: {"rows": list(rows), "right": own} for part, own in zip(PARTS, solved, strict=True)}
    losses = {domain: {"nats": [NATS.get(name, 2.0) * 10] * 3, "tokens": [10] * 3} for domain in DOMAINS}
    return {"name": name, "seed": seed, "parts": parts, "losses": losses}


def write(folder, *found):
    for one in found:
        (folder / f"{one['name'].replace(' ', '_')}-{one['seed']}.json").write_text(json.dumps(one))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, *(result(name, solved) for name, solved in SOLVED.items()))
    return tmp_path


def rows(folder, table):
    lines = TABLES[f"real, {table}"](folder).split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {name: own for name, *own in cells}


def test_the_worst_news_for_the_fused_model_comes_first(folder):
    found = rows(folder, "worst news")
    assert list(found)[0] == "mixed, solved"
    assert found["mixed, solved"] == [
        "25 % [0, 75]",
        "merge, ties",
        "100 % [100, 100]",
        "-75 [-100, -25]",
        "2 of 4",
        "1",
    ]
    assert found["tasks, solved"][3:] == ["+0 [+0, +0]", "0 of 4", "0"]
    assert found["math, nats per token"] == ["1.500", "merge, ties", "1.000", "-0.500 [-0.500, -0.500]", "1 of 4", "1"]


def test_the_best_mean_comes_first_among_all_that_solve(folder):
    found = rows(folder, "solved")
    assert list(found)[:2] == ["merge, ties", "fused"]
    assert found["fused"] == ["75.0 %", "75 % [25, 100]", "100 % [100, 100]", "100 % [100, 100]", "25 % [0, 75]"]


def test_the_headline_has_both_means(folder):
    assert rows(folder, "headline")["fused"] == ["75.0 %", "1.500"]


def test_a_contender_that_was_asked_less_is_compared_on_what_both_were_asked(folder):
    write(folder, result("merge, ties", ("11", "11", "10", "11"), rows=(0, 3)))
    found = rows(folder, "worst news")
    # of questions 0 and 3 the fused model solves neither of the mixed ones
    assert found["mixed, solved"][3] == "-100 [-100, -100]"
    assert found["products, solved"][3] == "-50 [-100, +0]"
    assert rows(folder, "solved")["fused"] == [
        "62.5 %",
        "50 % [0, 100]",
        "100 % [100, 100]",
        "100 % [100, 100]",
        "0 % [0, 0]",
    ]
    assert "| products, 2 |" in TABLES["real, solved"](folder)


def test_a_contender_that_was_not_asked_a_part_has_an_empty_cell_and_the_mean_says_so(folder):
    one = result("merge, ties", SOLVED["merge, ties"])
    del one["parts"]["mixed"]
    write(folder, one)
    assert rows(folder, "solved")["merge, ties"][-1] == ""
    assert "mean of the 3 that all were asked" in TABLES["real, solved"](folder)


def test_seeds_are_averaged_question_by_question(folder):
    write(folder, result("fused", ("0000", "1111", "1111", "0010"), seed=1))
    assert rows(folder, "solved")["fused"][1].startswith("38 %")


def test_retention_is_points_to_the_base_and_what_is_kept_of_what_it_solves(folder):
    found = rows(folder, "retention")
    assert list(found)[:2] == ["math specialist", "merge, ties"]
    assert found["math specialist"][2] == "-100 [-100, -100]"
    assert found["code specialist"][-1].startswith("50 % ")
    assert found["fused"][-1] == "100 % [100, 100]"


def test_keeping_is_of_the_right_specialist_and_the_line_names_where_it_is_too_little(folder):
    found = results(folder)
    assert [right_specialist(found, part) for part in PARTS] == [
        "math specialist",
        "code specialist",
        "base",
        "code specialist",
    ]
    table, line = TABLES["real, keeping"](folder).split("\n\n")
    assert table.splitlines()[0] == "|  | math | code | text | both |"
    assert "| fused | 75 % [25, 100] of 4 | 100 % [100, 100] of 4 | 100 % [100, 100] of 4 | 50 % " in table
    assert line.startswith(
        "Fused: keeps at least 95% of what the right specialist solves in 2 of 4 domains. Parts below: mixed "
    )
    assert line.endswith("products 75 % [25, 100] of 4.")


def test_parts_of_one_domain_are_counted_together(folder):
    for name, (products, *_) in SOLVED.items():
        one = json.loads((folder / f"{name.replace(' ', '_')}-0.json").read_text())
        one["parts"]["arithmetic"] = {"rows": [0, 1], "right": "11" if products == "1111" else "01"}
        write(folder, one)
    table, line = TABLES["real, keeping"](folder).split("\n\n")
    assert "| fused | 67 % " in table
    assert " of 6 |" in table
    assert "arithmetic 50 % [0, 100] of 2" in line


def test_results_of_other_adapters_are_not_compared(folder):
    write(folder, result("fused", SOLVED["fused"]) | {"weights": ["another"]})
    with pytest.raises(ValueError, match="of one base and the same adapters, but .* are of 2"):
        results(folder)


def test_the_line_says_so_if_all_is_kept():
    assert verdict("fused", {"math": None}, {"products": None}).endswith("in 0 of 0 domains.")


def test_the_figure_is_written(folder):
    real_figures.write(folder)
    drawn = (folder / "solved.svg").read_text()
    assert all(name in drawn for name in (*SOLVED, *PARTS))
