"""The search for coefficients, on functions that are known, and as a command."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.support.tiny import tokenizer
from tests.support.tuned import NAMES, make
from ultrafuser.cli.app import app
from ultrafuser.evaluation.measurement import held_out, mean_loss
from ultrafuser.merge import merge_method
from ultrafuser.merge.search_map import fit, map_search, pareto, points_of, terms
from ultrafuser.merge.search_simplex import on_simplex, simplex_search
from ultrafuser.merge.searches import check, recipe


def bowl(factors):
    one, two = factors
    return (one - 0.3) ** 2 + 2 * (two - 0.6) ** 2 + 0.5 * one * two + 1


def test_the_fit_finds_a_quadratic_from_12_points():
    factors = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = torch.tensor([[bowl(point)] for point in factors.tolist()], dtype=torch.float64)
    # one^2, one two, two^2, one, two, 1
    assert fit(factors, losses).flatten().tolist() == pytest.approx([1, 0.5, 2, -0.6, -2.4, 1.81])


@pytest.mark.parametrize("specialists", [2, 3, 4, 5])
def test_the_fit_holds_on_a_simplex_where_terms_depend_on_each_other(specialists):
    best = torch.arange(specialists, dtype=torch.float64) / 10
    for seed in range(20):
        drawn = on_simplex(specialists, points_of(specialists) - specialists, seed)
        shares = torch.cat([torch.eye(specialists, dtype=torch.float64), drawn])
        losses = (shares - best).square().sum(1, keepdim=True)
        torch.testing.assert_close(terms(shares) @ fit(shares, losses), losses, atol=1e-9, rtol=0)


def test_the_front_is_what_nothing_beats_and_the_best_is_measured():
    losses = torch.tensor([[1.0, 3], [2, 2], [3, 1], [2, 3], [3, 3], [1, 3]])
    assert pareto(losses).tolist() == [True, True, True, False, False, True]
    measured = []

    def measure(factors):
        measured.append(factors)
        one, two = factors
        return {"a": (one - 0.2) ** 2 + two**2, "b": (one - 0.8) ** 2 + (two - 1) ** 2}

    found = map_search(measure, 2)
    assert len(measured) == points_of(2) + 1 == 25
    assert found.error < 1e-9
    # the mean is least half-way between both ends
    assert found.best.factors == pytest.approx([0.5, 0.5], abs=0.03)
    assert found.best.factors in measured
    ends = [found.front[0].losses["a"], found.front[-1].losses["b"]]
    assert ends == pytest.approx([0, 0], abs=0.01)
    assert [p.losses["a"] for p in found.front] == sorted(p.losses["a"] for p in found.front)


def test_a_measured_point_is_taken_where_the_fit_is_wrong():
    # a hole that no quadratic has
    found = map_search(lambda factors: {"a": 0.0 if factors[0] > 0.9 else 1 + factors[0]}, 1)
    assert found.best.losses == {"a": 0.0}
    assert points_of(10) == 99


def test_the_bowl_on_the_simplex_is_least_where_its_slope_along_it_is_zero():
    # of one alone, two being 1 - one: (one - 0.3)^2 + 2 (0.4 - one)^2 + 0.5 one (1 - one) + 1, so 5 one = 1.7
    measured = []
    found = simplex_search(lambda p: {"a": bowl(p)} if not measured.append(p) else {}, 2)
    assert measured[:2] == [[1, 0], [0, 1]]
    assert len(measured) == points_of(2) + 1
    assert [sum(p) for p in measured] == pytest.approx([1] * 25)
    assert found.error < 1e-9
    assert found.best.factors == pytest.approx([0.34, 0.66], abs=0.005)
    assert found.shares


def test_a_known_optimum_inside_and_one_at_a_corner_are_found():
    inside = simplex_search(lambda p: {"a": (p[0] - 0.2) ** 2 + (p[1] - 0.5) ** 2 + (p[2] - 0.3) ** 2}, 3)
    assert inside.best.factors == pytest.approx([0.2, 0.5, 0.3], abs=0.02)
    corner = simplex_search(lambda p: {"a": 2 * p[0] + p[1] + 3 * p[2]}, 3)
    assert corner.best.factors == [0, 1, 0]
    assert recipe(corner, list(NAMES)) == "mix: fixed\nmix_weights: {text: 0.000, code: 1.000, math: 0.000}"


def test_draws_are_all_over_the_simplex():
    shares = on_simplex(3, 3000, 0)
    torch.testing.assert_close(shares.sum(1), torch.ones(3000, dtype=torch.float64))
    # uniform: the mean is the middle, and a share is above 0.5 with probability (1 - 0.5)^2
    torch.testing.assert_close(shares.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(
        (shares > 0.5).double().mean(0), torch.full((3,), 0.25, dtype=torch.float64), atol=0.02, rtol=0
    )


def test_shares_are_refused_of_methods_that_do_more_than_add_up():
    for method in ("ties:0.2", "average", "layer_swap:1,1"):
        with pytest.raises(ValueError, match="does more than add up .* Choose --method task_arithmetic"):
            check("simplex", merge_method(method))
    check("simplex", merge_method("task_arithmetic"))
    with pytest.raises(ValueError, match="'grid'.*one of .'map', 'simplex'"):
        check("grid", merge_method("task_arithmetic"))


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_the_command_takes_the_coefficients_of_the_least_loss_and_shows_the_front(tmp_path):
    sources = make(tmp_path)
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(sources["code"])
    torch.manual_seed(0)
    ids = model.generate(
        torch.randint(3, 99, (6, 4)), max_new_tokens=40, do_sample=True, eos_token_id=None, pad_token_id=0
    )
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    pairs = [f"{name}={sources[name]}" for name in NAMES[:2]]
    options = ["--base", base, "--method", "task_arithmetic", "--search", "map", "--out", tmp_path / "out"]
    done = run(*pairs, *options, "--data", f"code={tmp_path / 'code.jsonl'}")
    assert done.exit_code == 0, done.output
    assert "taken, measured" in done.output
    found = json.loads((tmp_path / "out" / "merge.json").read_text())["coefficients"]["layer 0"]
    # the text is what "code" writes
    assert found["code"] > 0.6 > 0.3 > found["text"]
    held = held_out([{"input_ids": row} for row in ids.tolist()], tokenizer(), prompt_tokens=1)
    loss = mean_loss(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), held)
    [row] = [line for line in done.output.splitlines() if "taken" in line]
    assert f"{loss:.3f}" in row
    shares = ["--search", "simplex", "--out", tmp_path / "mix"]
    done = run(*pairs, *options[:-4], *shares, "--data", f"code={tmp_path / 'code.jsonl'}")
    assert done.exit_code == 0, done.output
    assert "mix: fixed\nmix_weights: {text: 0.0" in done.output
    own = json.loads((tmp_path / "mix" / "merge.json").read_text())["coefficients"]["layer 0"]
    assert own["code"] > 0.6
    assert sum(own.values()) == pytest.approx(1)
    refused = run(*pairs, "--base", base, "--method", "ties:0.2", *shares[:2], "--out", tmp_path / "other")
    assert "does more than add up" in " ".join(refused.output.split())
    for wrong, message in (
        ([], "no rows"),
        (["--coefficients", "1", "--data", f"a={tmp_path / 'code.jsonl'}"], "leave --coef"),
    ):
        assert message in " ".join(run(*pairs, *options[:-1], tmp_path / "other", *wrong).output.split())
    assert not (tmp_path / "other").exists()
