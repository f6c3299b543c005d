"""Kill -9: what is half done never loads, nothing that was done is lost, and the same command goes on."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.hub_server import COMMIT, TOKEN, HubServer
from tests.support.killing import Commands
from tests.support.tiny import specialist, stir_gate, tokenizer


NAMES = ["text", "code"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer({}, store=tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def commands(server, tmp_path_factory):
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": TOKEN}
    modules = (
        "ultrafuser.build.fusion_recipe",
        "ultrafuser.hub.upload",
        "ultrafuser.train.stage_recipe",
        "ultrafuser.train.distil_recipe",
        "transformers.trainer",
    )
    with Commands(*modules, **environment) as commands:
        yield commands


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Specialists, and two fused models: "old" in one file, "new" in several."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name in NAMES:
        specialist(layers=1).save_pretrained(root / name)
        tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(root / name)
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, conversations(6))))
    for name, size in (("old", "5GB"), ("new", "40KB")):
        model = UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in NAMES})
        stir_gate(model)
        model.save_pretrained(root / name, max_shard_size=size)
        tokenizer(chat_template=CHAT_TEMPLATE if name == "old" else None).save_pretrained(root / name)
        (root / name / "README.md").write_text("---\nlicense: mit\n---\n")
    return root


@pytest.fixture(scope="module")
def seen(commands, tmp_path_factory):
    """What loads from a folder or the Hub: a fingerprint of the model and its tokenizer, or None."""

    def seen(model):
        done = commands.run("load", model, "main", tmp_path_factory.mktemp("cache"))
        assert done.code is not None
        return done.said.splitlines()[-1] if done.code == 0 else None

    return seen


@pytest.fixture(scope="module")
def fuse(models):
    return lambda out: ["fuse", *(f"{name}={models / name}" for name in NAMES), "--out", out / "fused"]


@pytest.fixture(scope="module")
def fused(commands, fuse, seen, tmp_path_factory):
    """What fusing changes, and the fingerprint of what comes out."""
    out = tmp_path_factory.mktemp("whole")
    done = commands.run(*fuse(out), under=out)
    assert done.code == 0, done.said
    return done.events, seen(out / "fused")


def moments(events):
    """Every event that is of a kind of its own: code files are copied one after another, and one is as the other."""
    return [e for e in dict.fromkeys(events) if not e.endswith("_ultrafuser.py") or e.endswith("gates_ultrafuser.py")]


def check_fusing(event, fused, commands, fuse, seen, tmp_path):
    events, whole = fused
    assert commands.run(*fuse(tmp_path), under=tmp_path, kill_at=events.index(event)).code is None
    for folder in tmp_path.iterdir():
        # where it is renamed when it is whole, it may be whole before
        assert seen(folder) in (None, whole), event
    if event == "remove fused/.ultrafuser.lock":  # all is done but this
        assert seen(tmp_path / "fused") == whole
        return
    assert not (tmp_path / "fused").exists()
    done = commands.run(*fuse(tmp_path))
    assert done.code == 0, done.said
    assert seen(tmp_path / "fused") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]


@pytest.mark.parametrize("event", ["half fused.part/model.safetensors", "rename fused.part"])
def test_fusing_killed_leaves_no_folder_and_the_same_command_makes_it(event, fused, commands, fuse, seen, tmp_path):
    check_fusing(event, fused, commands, fuse, seen, tmp_path)


@pytest.mark.slow
def test_fusing_killed_anywhere_leaves_no_folder_and_the_same_command_makes_it(fused, commands, fuse, seen, tmp_path):
    for event in moments(fused[0]):
        (tmp_path / "out").mkdir()
        check_fusing(event, fused, commands, fuse, seen, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


@pytest.fixture(scope="module", params=["train", pytest.param("distil", marks=pytest.mark.slow)])
def train(models, request):
    small = {"examples_per_domain": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    data = [word for name in NAMES for word in ("--data", f"{name}={models / name}.jsonl")]
    settings = [word for key, value in small.items() for word in (f"--{key}", value)]
    words = {"train": ["train", "--stage", "gate"], "distil": ["distil", "--student", "text"]}[request.param]
    words += ["--model", models / "old", *data, *settings]
    return lambda out: [*words, "--max-steps", 3, "--save_steps", 2, "--out", out / "stage"]


@pytest.fixture(scope="module")
def trained(commands, train, seen, tmp_path_factory):
    """What training changes, the weights that come out, and their fingerprint."""
    out = tmp_path_factory.mktemp("trained")
    done = commands.run(*train(out), under=out)
    assert done.code == 0, done.said
    return done.events, load_file(out / "stage" / "model.safetensors"), seen(out / "stage")


def check_training(event, trained, commands, train, seen, tmp_path):
    events, weights, whole = trained
    assert commands.run(*train(tmp_path), under=tmp_path, kill_at=events.index(event)).code is None
    assert seen(tmp_path / "stage") in (None, whole), event
    # what the library writes last makes a checkpoint whole
    whole_checkpoints = [n for n in (2, 3) if before(event, f"open stage/checkpoint-{n}/trainer_state.json", events)]
    done = commands.run(*train(tmp_path), "--resume")
    assert done.code == 0, done.said
    expected = f"stage/checkpoint-{whole_checkpoints[-1]}" if whole_checkpoints else "the beginning"
    assert f"Going on from {expected}" in done.said.replace(f"{tmp_path}/", ""), event
    again = load_file(tmp_path / "stage" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert seen(tmp_path / "stage") == whole


def before(event, earlier, events):
    """Whether one event was over when another came."""
    return events.index(earlier) < events.index(event)


@pytest.mark.parametrize("event", ["half stage/checkpoint-3/optimizer.pt", "half stage/model.safetensors"])
def test_training_killed_goes_on_from_the_last_whole_checkpoint(event, trained, commands, train, seen, tmp_path):
    check_training(event, trained, commands, train, seen, tmp_path)


@pytest.mark.slow
def test_training_killed_anywhere_goes_on_from_the_last_whole_checkpoint(trained, commands, train, seen, tmp_path):
    for event in moments(trained[0]):
        (tmp_path / "out").mkdir()
        check_training(event, trained, commands, train, seen, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


def check_pushing(number, repository, old, models, server, commands, seen, tmp_path):
    """Kills a push at a request, counted from 0. Returns whether there was one to kill it at."""
    if old:
        server.branches[repository] = {"main": COMMIT}
        server.trees[repository, COMMIT] = models / "old"
    # content that no other push has sent
    torch.manual_seed(len(server.requests))
    folder = shutil.copytree(models / "new", tmp_path / repository)
    model = UltraFuserForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    before, count = len(server.received), itertools.count()
    server.watch = lambda request: commands.kill() if next(count) == number else None
    killed = commands.run("push", folder, repository, "--yes").code is None
    server.watch = lambda request: None
    new, now = seen(folder), seen(repository)
    assert now in (new, seen(models / "old") if old else None)
    done = commands.run("push", folder, repository, "--yes")
    assert done.code == 0, done.said
    assert seen(repository) == new
    sent = server.received[before:]
    assert len(sent) == len(set(sent)), "something was sent twice"
    return killed


@pytest.mark.parametrize(("old", "number"), [(True, 8), (False, 12)])
def test_pushing_killed_leaves_what_was_there_and_the_same_command_ends_it(
    old, number, models, server, commands, seen, tmp_path
):
    assert check_pushing(number, f"lab/quick-{old}", old, models, server, commands, seen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("old", [True, False])
def test_pushing_killed_anywhere_leaves_what_was_there_and_the_same_command_ends_it(
    old, models, server, commands, seen, tmp_path
):
    number = 0
    while check_pushing(number, f"lab/at-{old}-{number}", old, models, server, commands, seen, tmp_path):
        number += 1
    assert number > 10, "hardly a request was seen"
