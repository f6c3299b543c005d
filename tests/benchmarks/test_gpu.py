"""The GPU script in small, on the CPU: what it writes is what the study's tables read."""

import json
import time

import pytest

from benchmarks import gpu
from experiments import real_runs
from experiments.real_averages import parts, results
from experiments.real_tables import TABLES
from tests.support import small_study


pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return small_study.make(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(
        gpu, "materials", lambda device: small_study.MATERIALS | {"device": device, "made": "study-gpu"}
    )
    short = {name: part._replace(longest=4) for name, part in real_runs.PARTS.items()}
    monkeypatch.setattr(real_runs, "PARTS", short)
    for name, value in (("BATCHES", (1, 2)), ("PROMPT", 4), ("STEPS", 2), ("CORE", gpu.CORE[:5])):
        monkeypatch.setattr(gpu, name, value)


@pytest.mark.slow
def test_decoding_is_measured_beside_its_floor(work, tmp_path):
    gpu.decoding(work, tmp_path / "decoding.json", "cpu", rounds=2)
    found = json.loads((tmp_path / "decoding.json").read_text())["batches"]
    assert list(found) == ["1", "2"]
    floors = {name: own["floor"] for name, own in found["1"].items()}
    assert list(floors) == [
        "one specialist",
        "fused, adapters of one base",
        "fused, whole models",
        "fused, stacked",
        "dense, about three times the size",
    ]
    assert floors["one specialist"] < floors["fused, adapters of one base"] < floors["fused, whole models"]
    assert all(own["least"] <= own["milliseconds"] <= own["most"] for own in found["1"].values())


@pytest.mark.slow
def test_the_dense_model_has_about_three_times_the_weights_of_the_layers(work):
    shop = gpu.Workshop(work, 0, **small_study.MATERIALS)
    one = shop.plain_base()

    def layers(model):
        return sum(p.numel() for p in model.model.layers.parameters())

    assert 2.5 < layers(gpu.dense(one)) / layers(one) < 3.5


@pytest.mark.slow
def test_the_core_is_in_the_form_of_the_studys_results(work, tmp_path, capsys):
    gpu.core(work, tmp_path / "core", "cpu", time.monotonic() + 600, first=1)
    found = results(tmp_path / "core")
    assert set(found) == {"base", "math specialist", "code specialist", "oracle", "fused"}
    assert "HumanEval" not in parts(found)
    for name, table in TABLES.items():
        assert "fused" in table(tmp_path / "core"), name


def test_nothing_is_begun_that_would_not_end_in_time(work, tmp_path, capsys):
    gpu.core(work, tmp_path / "core", "cpu", time.monotonic() - 1, first=1)
    assert not (tmp_path / "core").exists()
    assert capsys.readouterr().out.count("left out, there is no time") == 5


def test_all_questions_are_asked_and_stages_are_longer():
    run = next(run for run in gpu.ledger.read("real") if run.variant == "fused, stage two")
    found = gpu.enlarged(run.settings, "cpu", human_eval=True, first=None)
    assert found["questions"]["products"] is None
    assert found["questions"]["arithmetic"] == gpu.EACH["arithmetic"]
    assert found["contender"]["stage"]["max_steps"] == gpu.STAGE["max_steps"]
    assert found["contender"]["joint"] == run.settings["contender"]["joint"]
