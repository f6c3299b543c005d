"""Scores of benchmarks, in the card and where the Hub's leaderboards look for them."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from huggingface_hub import metadata_load, parse_eval_result_entries
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist
from ultrafuser.cli.app import app
from ultrafuser.hub.benchmark_results import BENCHMARKS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "fused"
    models = {name: specialist(layers=1, hidden_size=16) for name in ("text", "code")}
    UltraFuserForCausalLM.from_specialists(models).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved):
    (saved / "README.md").unlink(missing_ok=True)
    for file in saved.glob(".eval_results/*"):
        file.unlink()
    return saved


def score(value):
    return {"value": value, "stderr": 0.01}


def bench(folder, tmp_path, task="gsm8k", limit=None, **scores):
    """A file as `ultrafuser bench` writes it."""
    scores = scores or {"exact_match,strict-match": score(0.1), "exact_match,flexible-extract": score(0.40561)}
    results = {"task": task, "scores": {task: scores}, "versions": {"lm_eval": "0.4.13"}}
    results["settings"] = {"model": str(folder), "limit": limit, "shots": 0}
    (tmp_path / f"{task}.json").write_text(json.dumps(results))
    return tmp_path / f"{task}.json"


def card(folder, *files):
    return CliRunner().invoke(app, ["card", str(folder), *(f"--results={file}" for file in files)])


def kept(folder):
    return {p.name: p.read_text() for p in folder.glob(".eval_results/*")}


def test_scores_are_in_the_card_and_in_a_file_that_the_hub_reads(folder, tmp_path):
    other = bench(folder, tmp_path, "ifeval", **{"acc,none": score(0.25)})
    assert card(folder, bench(folder, tmp_path), other).exit_code == 0
    assert list(kept(folder)) == ["gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(kept(folder)["gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 40.56)
    assert entry.notes == "0-shot, flexible-extract, lm-eval 0.4.13"
    (model,) = metadata_load(folder / "README.md")["model-index"]
    found = {r["dataset"]["type"]: {m["type"]: m["value"] for m in r["metrics"]} for r in model["results"]}
    assert found["openai/gsm8k"] == {"exact_match_strict-match": 0.1, "exact_match_flexible-extract": 0.4056}
    assert found["ifeval"] == {"acc": 0.25}
    assert "| ifeval | acc | 0.2500 | 0-shot |" in (folder / "README.md").read_text()


def test_a_part_of_a_benchmark_is_for_no_leaderboard_and_old_scores_do_not_stay(folder, tmp_path):
    assert card(folder, bench(folder, tmp_path)).exit_code == 0
    assert card(folder, bench(folder, tmp_path, limit=10)).exit_code == 0
    assert not kept(folder)
    assert "| 0.4056 | 0-shot, 10 questions |" in (folder / "README.md").read_text()


def test_scores_of_someone_else_are_neither_replaced_nor_removed(folder, tmp_path):
    (folder / ".eval_results").mkdir(exist_ok=True)
    (folder / ".eval_results/gsm8k.yaml").write_text("- value: 1\n")
    shown = card(folder, bench(folder, tmp_path))
    assert shown.exit_code == 2
    assert "gsm8k.yaml' is another's. Move it away" in shown.output.replace("\n", " ")
    assert card(folder).exit_code == 0
    assert kept(folder) == {"gsm8k.yaml": "- value: 1\n"}


def test_results_of_another_model_or_without_the_score_that_is_ranked_are_refused(folder, tmp_path):
    shown = card(folder, bench(tmp_path, tmp_path))
    assert (shown.exit_code, "Results must be those of this model" in shown.output) == (2, True)
    shown = card(folder, bench(folder, tmp_path, **{"acc,none": score(0.5)}))
    assert (shown.exit_code, "ranks by 'exact_match,flexible-extract'" in shown.output.replace("\n", " ")) == (2, True)
    (tmp_path / "odd.json").write_text('{"scores": {"gsm8k": {"acc": 1}}, "task": "gsm8k"}')
    shown = card(folder, tmp_path / "odd.json")
    assert (shown.exit_code, "is damaged" in shown.output) == (2, True)
    assert not kept(folder)
    assert not (folder / "README.md").exists()


def test_lm_eval_asks_the_data_set_of_each_leaderboard_and_has_its_metric():
    tasks = Path(find_spec("lm_eval").origin).parent / "tasks"
    for name, file in (("gsm8k", "gsm8k/gsm8k.yaml"), ("mmlu_pro", "mmlu_pro/_default_template_yaml")):
        text = (tasks / file).read_text()
        metric, _, filters = BENCHMARKS[name].metric.partition(",")
        assert f"dataset_path: {BENCHMARKS[name].dataset}\n" in text
        assert f"metric: {metric}\n" in text
        assert f'name: "{filters}"' in text


def test_two_results_of_one_task_are_refused(folder, tmp_path):
    whole, part = bench(folder, tmp_path), bench(folder, tmp_path, "part", limit=10)
    part.write_text(part.read_text().replace('"part"', '"gsm8k"'))
    result = card(folder, whole, part)
    assert result.exit_code == 2
    assert "one result of a task, but got several of ['gsm8k']" in " ".join(result.stderr.split())
    assert not (folder / "README.md").exists()
    assert not kept(folder)
