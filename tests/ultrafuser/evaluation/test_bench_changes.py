"""Benchmarks of two models: shares of scores, and answers that flipped, counted by hand."""

import json

import pytest
from rich.console import Console


pytest.importorskip("lm_eval")

from modeling_ultrafuser.refusals_ultrafuser import Refusal  # noqa: E402
from ultrafuser.evaluation import bench_changes  # noqa: E402
from ultrafuser.evaluation.bench_changes import answers, changes, read_others, table  # noqa: E402


def result(task, score, own=None, seconds=None, **settings):
    scores = {task: {"exact_match,strict": {"value": score, "stderr": None}, "other,none": {"value": 0.9}}}
    asked = {"limit": None, "chat": False, "shots": 0, "seed": 0, "model": "m", **settings}
    return {"task": task, "scores": scores, "settings": asked, "answers": own, "seconds": seconds}


HERE = {"sums": result("sums", 0.5, [1, 1, 0, 0], 10.0), "essays": result("essays", 0.3, None, 20.0)}
THERE = {"sums": result("sums", 0.75, [1, 0, 1, 1], 5.0), "poems": result("poems", 0.3, [1])}


def test_ratio_and_flips_are_of_the_tasks_that_both_have():
    found = changes(HERE, THERE)
    assert list(found) == ["sums"]
    assert found["sums"] == (0.5, 0.75, 0.5, 0.25)
    assert found["sums"].ratio == pytest.approx(2 / 3)
    # nothing to reach, nothing known of single answers
    nothing = changes(HERE, {"essays": result("essays", 0.0)})["essays"]
    assert (nothing.ratio, nothing.lost, nothing.won) == (None, None, None)


def test_the_table_has_the_mean_of_ratios_and_of_times(capsys):
    base = {"sums": result("sums", 0.25, [0, 0, 0, 1], 20.0), "essays": result("essays", 0.3, None, 10.0)}
    Console(width=160).print(table(HERE, {"math": THERE, "base": base}))
    lines = {line.split()[1]: line.split()[3:] for line in capsys.readouterr().out.splitlines() if "│" in line}
    lines = {name: [word for word in words if word != "│"] for name, words in lines.items()}
    assert lines["sums"] == ["0.5000", "66.7%", "50.0%", "25.0%", "200.0%", "25.0%", "50.0%"]
    assert lines["essays"] == ["0.3000", "100.0%"]
    # of 2/3 alone; of 2 and 1
    assert lines["mean"] == ["0.4000", "66.7%", "150.0%"]
    assert lines["seconds"] == ["30", "200.0%", "100.0%"]


def test_answers_are_those_of_the_first_metric_in_the_questions_order():
    rows = [
        {"doc_id": 1, "filter": "strict", "exact_match": 0.0, "other": 1},
        {"doc_id": 0, "filter": "flexible", "exact_match": 0.0},
        {"doc_id": 0, "filter": "strict", "exact_match": True, "other": 0},
    ]
    scores = {"alias": "sums", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,flexible": 0}
    assert answers("sums", {"results": {"sums": scores}, "samples": {"sums": rows}}) == [1, 0]
    rows[0]["exact_match"] = 0.4
    assert answers("sums", {"results": {"sums": scores}, "samples": {"sums": rows}}) is None
    assert answers("group", {"results": {"group": {"alias": "group"}}, "samples": {}}) is None


def test_other_questions_and_a_folder_without_results_are_refused(tmp_path):
    with pytest.raises(
        Refusal, match="'limit': None, 'shots': 0.* here and .*'limit': 10, 'shots': 5.* there.*Run both alike"
    ):
        changes(HERE, {"sums": result("sums", 0.5, limit=10, shots=5)})
    (tmp_path / "sums.json").write_text(json.dumps(THERE["sums"]))
    files = {"sums": "sums.json", "essays": "essays.json"}
    assert read_others({"math": str(tmp_path)}, files) == {"math": {"sums": THERE["sums"]}}
    with pytest.raises(Refusal, match=r"no result of \['poems'\].*Run `ultrafuser bench` on 'math' first"):
        read_others({"math": str(tmp_path)}, {"poems": "poems.json"})
    assert bench_changes.seconds(HERE, {"sums": 0}) == 10
