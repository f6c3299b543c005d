"""The table of families is whole and says nothing wrong; each family is run anew by `pytest -m slow`."""

import json
import os
import subprocess
import sys

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from experiments.tables import ROOT
from ultrafuser.provenance import versions


RESULTS = json.loads((ROOT / "results" / "families.json").read_text())
FAMILIES = sorted({c.model_type for c in MODEL_FOR_CAUSAL_LM_MAPPING if c.__module__.startswith("transformers.")})


def run(tmp_path, *families):
    command = [sys.executable, "tests/families.py", *families, "--results", str(tmp_path / "families.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return done, json.loads((tmp_path / "families.json").read_text())


@pytest.mark.skipif(
    RESULTS["provenance"]["versions"]["transformers"] != versions()["transformers"], reason="of another transformers"
)
def test_every_family_of_this_transformers_is_in_the_table():
    assert sorted(RESULTS["families"]) == FAMILIES


def test_no_family_in_the_table_is_wrong():
    assert not {f: r["verdict"] for f, r in RESULTS["families"].items() if r["verdict"].startswith("wrong")}


def test_what_fusing_refuses_by_its_kind_the_check_refuses_too():
    told = {f: r for f, r in RESULTS["families"].items() if isinstance(r.get("itself"), str)}
    assert not [f for f, r in told.items() if r["check"] == "fits"]


@pytest.mark.slow
def test_a_family_that_has_a_result_is_not_run_again(tmp_path):
    table = {"provenance": {"versions": versions()}, "families": {"llama": {"verdict": "right, long ago"}}}
    (tmp_path / "families.json").write_text(json.dumps(table))
    done, found = run(tmp_path, "llama", "mamba")
    assert done.stdout.splitlines()[0] == "llama: right, long ago"
    assert done.stdout.splitlines()[1].startswith("mamba: refused: ")
    assert done.returncode == 0
    assert found["families"]["llama"] == table["families"]["llama"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_ends_right_or_as_alone_or_refused(family, tmp_path):
    done, found = run(tmp_path, family)
    assert done.returncode == 0, found["families"][family]["verdict"]
