"""Making a set is killed or interrupted, and goes on with nothing lost and nothing paid twice."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.teacher_server import TINY, TeacherServer, write_recipe
from tests.vllm import check_vllm
from tests.vllm.cases import save_fused
from ultrafuser.data.cost_plan import Plan
from ultrafuser.data.recipe import load_recipe
from ultrafuser.data.synthesis_run import make_set


ROOT = Path(__file__).parents[2]


CLI = [sys.executable, "-c", "from ultrafuser.cli import main; main()", "data"]


CONCURRENCY = TINY["teacher"]["concurrency"]


def make(path, out):
    return make_set(load_recipe(path), out, console=Console(quiet=True))


def files(out):
    """Digests of everything that was made but the journal, whose lines are in the order in which replies came."""
    made = [path for path in out.rglob("*") if path.is_file() and path.name != "journal.jsonl"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe's data, made without trouble: folder, report, server."""
    out = tmp_path_factory.mktemp("made")
    with TeacherServer() as server:
        report = make(write_recipe(out, server.url), out / "set")
    return out / "set", report, server


def journal(out):
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "at", [0.5, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_with_nothing_paid_twice_and_nothing_lost(at, made, tmp_path):
    with TeacherServer(delay=0.02) as server:
        path, out = write_recipe(tmp_path, server.url), tmp_path / "set"
        calls = Plan(load_recipe(path)).total["calls"]
        command = [*CLI, "make", str(path), "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while len(server.answered) < at * calls:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        kept, killed_at = len(journal_lines(out)), len(server.bodies)
        assert not (out / "report.json").exists()
        report = make(path, out)
        distinct = server.counts()
        assert len(distinct) == calls == report["replies"]
        # only what was under way when it was killed was asked for again
        assert len(server.bodies) - calls == killed_at - kept <= CONCURRENCY
    assert {**report, "recipe": 0} == {**made[1], "recipe": 0}
    assert {**files(out), "report.json": 0} == {**files(made[0]), "report.json": 0}


def journal_lines(out):
    return [line for line in (out / "journal.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.slow
def test_a_run_that_is_interrupted_by_hand_ends_at_once_and_goes_on(tmp_path):
    with TeacherServer(delay=0.5) as server:
        path, out = write_recipe(tmp_path, server.url), tmp_path / "set"
        # whoever runs tests in the background has Ctrl-C ignored
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        command = [*CLI[:2], heard + CLI[2], *CLI[3:], "make", str(path), "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        while len(server.answered) < 5:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert said.splitlines()[-1] == "Stopped. What was finished is kept."
        assert "Traceback" not in said
        server.delay = 0.0
        assert make(path, out)["given_up"] == {}


@pytest.mark.slow
def test_a_real_server_that_ends_half_way_gives_a_whole_set_when_it_is_back(tmp_path):
    """In vLLM, which keeps even random weights to the schema of a list."""
    python = check_vllm.environment(Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")))
    save_fused(
        tmp_path / "model",
        [("llama", {"max_position_embeddings": 4096}), ("llama", {"max_position_embeddings": 4096, "layers": 3})],
    )
    teacher = {"model": "fused", "max_tokens": 300, "timeout": 300, "concurrency": 4, "retries": 1}
    changes = {f"teacher__{name}": value for name, value in teacher.items()}
    changes |= {"keep_cut_off": True, "items_per_request": 2, "more_rounds": 12, "budget": {}}
    # between brackets, JSON allows any number of blanks, and weights that know nothing make use of that
    options = "--enforce-eager", '--structured-outputs-config={"backend":"xgrammar","disable_any_whitespace":true}'
    logs = [tmp_path / name / "server.log" for name in ("first", "second")]
    for log in logs:
        log.parent.mkdir()

    out = tmp_path / "set"
    with check_vllm.server(logs[0].parent, python, tmp_path / "model", *options) as url:
        command = [*CLI, "make", write_recipe(tmp_path, f"{url}/v1", **changes), "--out", out]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        while not out.exists() or len(journal_lines(out)) < 50:
            assert process.poll() is None
            time.sleep(0.1)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "all replies so far are kept" in said
    kept = journal_lines(out)

    with check_vllm.server(logs[1].parent, python, tmp_path / "model", *options) as url:
        report = make(write_recipe(tmp_path, f"{url}/v1", **changes), out)
    assert (report["stopped"], report["refused"], report["given_up"]) == (None, 0, {})
    sizes = {name: sum(kinds.values()) for name, kinds in report["records"].items()}
    assert sizes == {"text": 16, "code": 16, "math": 12}
    assert journal_lines(out)[: len(kept)] == kept
    answered = sum(log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200') for log in logs)
    # what the server said while it was ended may not have arrived
    assert report["replies"] == len({entry["key"] for entry in journal(out)}) <= answered
    assert answered <= report["replies"] + teacher["concurrency"]
