import json
from functools import partial

import pytest
from typer.testing import CliRunner

from ultrafuser.cli.app import app
from ultrafuser.quickstart import toy
from ultrafuser.quickstart.corpora import DOMAINS, documents, splits
from ultrafuser.quickstart.toy import run
from ultrafuser.quickstart.toy_models import Schedule


def test_parts_share_no_document_and_leave_none_out():
    found = documents("code", characters=50_000)
    parts = splits(found)
    assert [document for part in parts.values() for document in part] == found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_seed_gives_the_same_documents_and_another_seed_others(domain):
    one, again, other = (documents(domain, seed, characters=3_000) for seed in (0, 0, 1))
    assert one == again != other


def test_sums_and_products_are_right():
    lines = [line for text in documents("math", characters=30_000) for line in text.splitlines()]
    checked = 0
    for line in lines:
        if line.startswith("What is "):
            question = line.removeprefix("What is ").rstrip("?")
            steps = next(other for other in lines if other.startswith(f"{question} = "))
            assert len({eval(side) for side in steps.split(" = ")}) == 1
            checked += 1
    assert checked > 50


def test_a_quickstart_of_few_steps_leaves_a_folder_that_loads_elsewhere_and_its_numbers(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(toy, "documents", partial(documents, characters=40_000))
    losses = run(tmp_path, schedule=Schedule(base_steps=3, specialist_steps=3, gate_steps=2, joint_steps=2))
    assert json.loads((tmp_path / "results.json").read_text())["nats_per_token"] == losses
    assert set(losses) >= {"text specialist", "uniform fusion", "stage one: gate", "stage two: everything"}
    assert "Held-out loss, nats per token" in capfd.readouterr().out
    assert (tmp_path / "fused" / "modeling_ultrafuser.py").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = CliRunner().invoke(app, ["quickstart", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "not empty" in result.output
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
