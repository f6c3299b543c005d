"""The concurrency runs: what `results/serving_limits.json` says holds again."""

import json

import pytest


pytest.importorskip("fastapi")
pytest.importorskip("gradio")
from tests import load  # noqa: E402


def holds(found):
    for command in ("serve", "demo"):
        one = found[command]
        assert one["well at the end"]
        assert one["answered as alone"] == one["asked"]
        assert one["memory after, MB"] < 1.25 * one["memory before, MB"] + 50
    assert found["serve"]["answered otherwise"] == 0
    assert found["serve"]["refused or failed"] == {}
    assert found["threads"]["answered otherwise"] == 0
    assert set(load.STRANGERS) | {"100 MB, refused"} == set(found["serve"]["strangers"])


def test_the_run_that_the_documentation_shows_held():
    found = json.loads(load.OUT.read_text())
    holds(found)
    assert found["clients"] == 64


@pytest.mark.slow
def test_sixty_four_clients_among_strangers_are_answered_as_alone_and_memory_does_not_grow():
    holds(load.run(rounds=2, bodies=3))
