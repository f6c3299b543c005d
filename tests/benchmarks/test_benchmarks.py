"""Benchmarks at their smallest size: what is compared is alike, and figures show what the result files say."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from benchmarks import cost_figures, gate_costs, growth, rivals, serving
from benchmarks.timing import compare_ways
from tests.support.tiny import specialist
from tests.vllm import check_vllm
from ultrafuser.reports.marked_tables import with_tables


ROOT = Path(__file__).parents[2]
# heads of 16, so that one and a half times as wide has whole heads too
TINY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "vocab_size": 128,
}
SETTINGS = {"prompt": 6, "new": 3, "rounds": 2, "compile_steps": False}


@pytest.fixture(scope="module", autouse=True)
def _as_the_commands_set_it():
    verbosity = logging.get_verbosity()
    with torch.no_grad():
        yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def measured():
    """One regime of rivals."""
    torch.set_num_threads(1)
    return rivals.measure_rivals(TINY, **SETTINGS)


def test_ratios_are_of_one_round_and_to_the_first_way():
    seconds = {"one": iter([1.0, 2.0, 4.0]), "other": iter([3.0, 4.0, 20.0])}
    found = compare_ways({name: lambda own=own: {"time": next(own)} for name, own in seconds.items()}, 3)
    assert found["other"]["time"] == {"median": 3.0, "least": 2.0, "most": 5.0, "value": 4.0}
    assert found["one"]["time"] == {"median": 1.0, "least": 1.0, "most": 1.0, "value": 2.0}


# ---- rivals


@pytest.mark.e2e
def test_every_rival_runs_beside_ours(measured):
    # no sign: a token's time is a difference of two runs, which the noise of a tiny one can turn round
    assert all(math.isfinite(row[part]["value"]) for row in measured.values() for part in ("token", "prompt"))
    assert measured[rivals.ONE]["token"]["median"] == 1
    assert len(measured) == 16
    same = [name for name, row in measured.items() if row["same tokens as"] == "average of logits"]
    assert len(same) == 7
    assert 1 <= measured["fused, self-drafting"]["tokens in a round"] <= 3


def test_rivals_hold_the_weights_that_their_names_say(measured):
    weights = {name: row["weights"] for name, row in measured.items()}
    assert weights["loop over models, logits averaged"] == 3
    assert weights["fused, stacked"] == weights["fused"] == weights["assisted decoding, a specialist drafts"]
    assert 3 < weights["fused"] < 3.5  # the gate's width does not depend on the specialists'
    assert 1 < weights["PEFT, mixed adapters, logits averaged"] < weights["MoE of the MLPs, 1 of 3"] < 2.5


def test_a_dense_model_of_three_times_the_size_is_one_in_both_shapes_that_are_measured():
    for shape in rivals.SHAPES.values():
        with torch.device("meta"):
            one, three = (rivals.dense_model(shape, wider).num_parameters() for wider in (1, 1.5))
        assert three / one == pytest.approx(3, rel=0.06)


def test_adapters_are_found_by_x_lora(tmp_path):
    """PEFT passes over adapters that it cannot find without a word."""
    base, adapted, _ = rivals.related_models(TINY)
    adapted.save_pretrained(tmp_path)
    ids = torch.randint(3, TINY["vocab_size"], (1, 6))
    mixed = rivals.x_lora(base, tmp_path)(input_ids=ids, use_cache=False).logits
    assert (mixed - base(ids).logits).abs().max() > 0.01


def test_a_way_that_says_something_else_stops_the_benchmark(measured):
    ids = torch.arange(4)[None]

    def says(token):
        return lambda ids, new: torch.cat([ids, torch.full((1, new), token)], dim=-1)

    rows = {name: rivals.Row(says(5), [], "logits") for name in (rivals.FUSED, "another")}
    rows["fused, probabilities"] = rivals.Row(says(6), [], "probabilities")
    rows["something else"] = rivals.Row(says(7), [])
    rivals.check_alike(rows, ids, 2)
    with pytest.raises(RuntimeError, match="'another' should give the tokens of the average of logits"):
        rivals.check_alike(rows | {"another": rivals.Row(says(7), [], "logits")}, ids, 2)


def test_each_token_is_timed_without_the_prompt(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(rivals.time, "process_time", lambda: clock[0])

    def way(ids, new):
        clock[0] += 10 + 2 * (new - 1)

    assert rivals.seconds(way, None, 4) == {"prompt": 10, "token": 2}


# ---- growth


def test_growth_is_relative_to_one_specialist_under_the_same_conditions():
    found = growth.measure_growth(TINY, 1, specialists=2, batch=2, context=5, vocabulary=64)
    assert list(found) == ["one specialist", "fused", "fused, stacked"]
    assert found["one specialist"]["token"]["median"] == found["one specialist"]["prompt"]["median"] == 1


# ---- serving


def answers(last):
    return lambda prompts, new: ([[*range(new - 1), last] for _ in prompts], 0.5)


def test_throughput_counts_all_tokens_of_the_batch():
    ways = {"fused, transformers": answers(1), "fused, vLLM": answers(1)}
    found = serving.at_batch(ways, [[3], [4, 5]], rounds=1)
    assert found["fused, vLLM"] == {"median": 1, "least": 1, "most": 1, "value": 2 * serving.NEW / 0.5}


def test_other_tokens_in_vllm_stop_the_benchmark():
    ways = {"fused, transformers": answers(1), "fused, vLLM": answers(2)}
    with pytest.raises(RuntimeError, match="fused, vLLM continues 2 of 2 prompts otherwise than the fused"):
        serving.at_batch(ways, [[3], [4]], rounds=1)


def test_padding_does_not_change_what_a_batch_says():
    model = specialist(eos_token_id=None)
    prompts = [[5, 6, 7, 8], [9, 10]]
    serve = serving.in_transformers(model)
    assert serve(prompts, 5)[0] == [serve([prompt], 5)[0][0] for prompt in prompts]


def test_an_engine_that_ends_says_why(tmp_path):
    """This environment has no vLLM."""
    with (
        serving.in_vllm(sys.executable, tmp_path, 1) as serve,
        pytest.raises(RuntimeError, match="No module named 'vllm'"),
    ):
        serve([[1]], 1)


def test_without_vllms_environment_there_is_a_way_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tests/vllm/check_vllm.py --venv .*none"):
        serving.vllm_python(tmp_path / "none")


@pytest.mark.slow
def test_vllm_is_measured_beside_transformers():
    python = check_vllm.environment(Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")))
    shape = {**TINY, "hidden_size": 128}  # heads that vLLM's attention on a CPU supports
    found = serving.measure_throughput(*serving.untrained(shape), python, (1, 3), rounds=1)
    assert list(found) == ["1", "3"]
    assert found["3"]["fused, vLLM"]["value"] > 0


# ---- figures


@pytest.fixture
def results(tmp_path, measured, monkeypatch):
    """Result files of all three, as the commands write them."""
    monkeypatch.setattr(rivals, "measure_rivals", lambda *_, **__: measured)
    monkeypatch.setattr(growth, "REGIMES", dict.fromkeys(growth.REGIMES, TINY))
    monkeypatch.setattr(growth, "VARIED", {"specialists": (2, 4), "batch": (2,), "context": (4,), "vocabulary": (64,)})
    for benchmark in (rivals, growth):
        file = tmp_path / f"{benchmark.__name__.split('.')[-1]}.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(file)])
        benchmark.main()
    ways = ("fused, transformers", "fused, stacked, transformers", "one specialist, transformers", "fused, vLLM")
    served = {b: serving.at_batch({w: answers(1) for w in ways}, [[3]] * int(b), 1) for b in ("1", "16")}
    (tmp_path / "serving.json").write_text(json.dumps({"quickstart": served, "random": served}))
    return tmp_path


@pytest.mark.e2e
def test_figures_and_tables_are_made_from_result_files(results, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures"
    monkeypatch.setattr(sys, "argv", ["figures", "--results", str(results), "--out", str(out)])
    cost_figures.main()
    assert {file.stem for file in out.glob("*.svg")} == {"rivals", "growth_token", "growth_prompt", "serving"}
    found = json.loads((results / "rivals.json").read_text())["small"]
    drawn, printed = (out / "rivals.svg").read_text(), capsys.readouterr().out
    assert all(name in drawn and f"| {name} |" in printed for name in found)
    assert f"| 16 | {16 * serving.NEW / 0.5:.0f}: 1.00 (1.00 to 1.00)" in printed
    assert printed.count("<!-- results/") == printed.count("<!-- end -->") == 1 + 2 + 8 + 2


def test_tables_of_the_page_are_written_anew():
    page = "before\n<!-- results/rivals.json: small -->\n\n| old |\n\n<!-- end -->\nafter\n"
    written = with_tables(page, lambda path, name: {"results/rivals.json: small": "| new |"}[f"{path}: {name}"])
    assert written == page.replace("old", "new")


def test_a_missing_result_file_is_told_with_what_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures", "--results", str(tmp_path), "--out", str(tmp_path / "figures")])
    cost_figures.main()
    assert "`python -m benchmarks.growth` writes it" in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()


@pytest.mark.e2e
def test_figures_and_tables_of_the_documents_are_made_from_the_result_files(tmp_path, monkeypatch):
    committed, out = ROOT / "docs" / "benchmarks", tmp_path / "benchmarks"
    shutil.copy(committed.with_suffix(".md"), tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures", "--out", str(out)])
    cost_figures.main()
    assert out.with_suffix(".md").read_text() == committed.with_suffix(".md").read_text()
    made = {file.name: file.read_text() for file in out.glob("*.svg")}
    assert {name: (committed / name).read_text() for name in made} == made


# ---- gates


@pytest.mark.e2e
def test_every_gate_is_measured_beside_the_papers_and_those_that_look_back_have_a_state():
    sizes = {key: TINY[key] for key in ("intermediate_size", "num_hidden_layers", "vocab_size")}
    rows = gate_costs.measure_gates(1, hidden_size=64, **sizes)
    assert rows[gate_costs.PAPER]["token"]["median"] == 1
    assert rows[gate_costs.PAPER]["parameters"] == 64 * 512 + 512 + 512
    assert {gate for gate, row in rows.items() if row["state_bytes"]} == {"evidence:128+calibration", "posterior"}
    assert gate_costs.table(rows).count("KiB") == 2
