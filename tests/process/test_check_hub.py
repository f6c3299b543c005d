"""`ultrafuser check` of repositories: little is downloaded, and what the Hub denies is told."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import set_seed
from typer.testing import CliRunner

from tests.support.checkpoints import (
    save,
)
from tests.support.hub_server import COMMIT, TOKEN, HubServer, environment
from tests.support.stand_ins import (
    QWEN_7B,
    qwen_words,
    stand_in,
)
from tests.support.tiny import specialist, tokenizer
from ultrafuser.cli.app import app


@pytest.fixture
def folders(tmp_path):
    yield tmp_path
    # files of many gigabytes, if only by their length
    shutil.rmtree(tmp_path)


@pytest.fixture(autouse=True)
def _memory_for_all(monkeypatch):
    """What is said does not depend on the machine."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 50))


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def told(*arguments):
    """What the command says to programs; its exit status says the same."""
    shown = run(*arguments, "--json")
    found = json.loads(shown.stdout)
    assert shown.exit_code == (2 if found["verdict"] == "blocks" else 0)
    return found


# ---------------------------------------------------------------------------------- what fusing itself does


def small(folder, family="llama", words=None, **fields):
    return save(specialist(family, **{"layers": 1, "hidden_size": 16, **fields}), folder, words)


# ---------------------------------------------------------------------------------- the Hub


@pytest.mark.slow
def test_three_seven_billion_models_are_checked_in_less_than_5_mb(folders):
    words = qwen_words()
    ids = {f"Qwen/{name}": folders / name for name in ("Text-7B", "Coder-7B", "Math-7B")}
    first = stand_in(folders / "Text-7B", words, shards=4, template="chat", **QWEN_7B)
    # as most repositories have it, but nothing writes it any more
    added = {str(i): {"content": t} for t, i in words.get_added_vocab().items()}
    path = first / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    for name in ("Coder-7B", "Math-7B"):
        shutil.copytree(first, folders / name, copy_function=os.link)
    assert (folders / "Text-7B" / "tokenizer.json").stat().st_size > 4e6
    with HubServer(ids) as server:
        code = "import sys; from ultrafuser.cli import main; sys.argv[0] = 'ultrafuser'; main()"
        command = [sys.executable, "-c", code, "check", *ids, "--json"]
        shown = subprocess.run(command, env=environment(server, folders / "home"), capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        found = json.loads(shown.stdout)
        assert server.sent < 5e6
        assert not [r for r in server.requests if r.startswith("GET") and r.endswith("tokenizer.json")]
    assert {s["commit"] for s in found["specialists"].values()} == {COMMIT}
    told = {f["text"] for f in found["findings"] if f["about"] == "tokenizer"}
    assert told == {"the same for all, told from the hashes of the files on the Hub."}
    assert found["merges"]["possible"]
    assert found["numbers"]["download"] == pytest.approx(3 * 2 * 7.62e9, rel=0.01)


# judges one list of arguments after another, each with a token or without, and prints what it found
DRIVER = """
import json, os, sys
from ultrafuser.check.checks import Judgement
from ultrafuser.check.checks import judge
from ultrafuser.check.metadata import parse
from ultrafuser.check.render import as_dict
for arguments, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    print(json.dumps(as_dict(judge(parse(arguments)))))
"""


@pytest.mark.slow
def test_what_the_hub_denies_or_does_not_have_is_told(tmp_path):
    set_seed(0)
    for name in ("text", "code", "closed", "hidden", "older"):
        small(tmp_path / name)
    small(tmp_path / "different", words=tokenizer(swap="ab"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    ids = {f"lab/{path.name}": path for path in tmp_path.iterdir()}
    cases = {
        "fits": (["lab/text", "lab/code@main"], None),
        "gated": (["lab/text", "lab/closed"], None),
        "gated, wrong token": (["lab/text", "lab/closed"], "hf_wrong"),
        "gated, right token": (["lab/text", "lab/closed"], TOKEN),
        "private": (["lab/text", "lab/hidden"], None),
        "private, right token": (["lab/text", "lab/hidden"], TOKEN),
        "no such revision": (["lab/text", "lab/code@v9"], None),
        "different tokenizer": (["lab/text", "lab/different"], None),
        "adapter": (["lab/text", "lab/adapter"], None),
        "a folder and the Hub": ([str(tmp_path / "text"), "lab/code"], None),
    }
    with HubServer(ids, gated=["lab/closed"], private=["lab/hidden"]) as server:
        command = [sys.executable, "-c", DRIVER, json.dumps(list(cases.values()))]
        home = tmp_path / "home"
        shown = subprocess.run(command, env=environment(server, home), capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    found = dict(zip(cases, map(json.loads, shown.stdout.splitlines()), strict=True))
    blocks = {case: [f["text"] for f in j["findings"] if f["status"] == "blocks"] for case, j in found.items()}
    for case in ("fits", "gated, right token", "private, right token", "a folder and the Hub"):
        assert blocks[case] == [], case
    assert "'lab/closed') is gated, and no token was found" in blocks["gated"][0]
    assert "is gated, and a token was found" in blocks["gated, wrong token"][0]
    assert "private, and no token was found" in blocks["private"][0]
    assert "'lab/code', revision 'v9') has no such revision" in blocks["no such revision"][0]
    assert "2 ids differ, the first is 69" in blocks["different tokenizer"][0]
    assert "holds only an adapter" in blocks["adapter"][0]
    assert "open to your token" in str(found["gated, right token"]["findings"])
    for secret in (TOKEN, "hf_wrong"):
        assert secret not in shown.stdout + shown.stderr
