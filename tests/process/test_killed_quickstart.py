"""Kill -9 in the real quickstart: every finished step is kept, and the same command goes on to the same end."""

import pytest
from transformers import AutoModelForCausalLM

from modeling_ultrafuser.files_ultrafuser import read_json
from tests.support import small_real
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.gguf_files import write
from tests.support.hub_server import COMMIT, TOKEN, HubServer
from tests.support.killing import Commands


MODULES = ("tests.support.small_real", "ultrafuser.train.stage_recipe", "transformers.trainer")
# each is the end of a step, or in the middle of one
MOMENTS = [
    "rename base.part",
    "rename cache/cache.json.partial",
    "half fused.part/model.safetensors",
    "rename .results.json.part",
    "rename .answers.json.part",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("gguf")
    folder = small_real.make(tmp_path_factory.mktemp("made"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    write(folder / "base.gguf", base, fields={"tokenizer.chat_template": CHAT_TEMPLATE}, merged=True)
    return folder


@pytest.fixture(scope="module")
def server(made):
    with HubServer({"lab/base": made / "base"}) as server:
        yield server


@pytest.fixture(scope="module")
def commands(made, server, tmp_path_factory):
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": TOKEN}
    with Commands(*MODULES, SMALL_REAL=str(made), **environment) as commands:
        yield commands


@pytest.fixture(scope="module")
def words(made):
    return lambda out, base=made / "base.gguf": ["quickstart", "--real", "--base", base, "--out", out / "out"]


@pytest.fixture(scope="module")
def whole(commands, words, tmp_path_factory):
    """What a whole run changes, its losses and its answers."""
    out = tmp_path_factory.mktemp("whole")
    done = commands.run(*words(out), under=out / "out")
    assert done.code == 0, done.said
    return done.events, *outcome(out)


def outcome(folder):
    found = read_json(folder / "out" / "results.json")["nats_per_token"]
    return found, read_json(folder / "out" / "answers.json")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_step_the_same_command_ends_as_if_it_had_not_been(moment, whole, commands, words, tmp_path):
    events, *expected = whole
    assert commands.run(*words(tmp_path), under=tmp_path / "out", kill_at=events.index(moment)).code is None
    done = commands.run(*words(tmp_path), under=tmp_path / "out")
    assert done.code == 0, done.said
    assert list(outcome(tmp_path)) == expected
    # what was finished before is not made anew
    finished = [m for m in ("rename base.part", "rename fused.part") if events.index(m) < events.index(moment)]
    assert not {*finished} & {*done.events}


@pytest.mark.slow
def test_a_base_on_the_hub_is_read_at_the_commit_that_is_said(whole, commands, words, server, tmp_path):
    done = commands.run(*words(tmp_path, f"lab/base@{COMMIT}"), under=tmp_path / "out")
    assert done.code == 0, done.said
    assert read_json(tmp_path / "out" / "results.json")["base_commit"] == COMMIT
    assert not (tmp_path / "out" / "base").exists()
    assert any(f"/lab/base/resolve/{COMMIT}/model.safetensors" in request for request in server.requests)
