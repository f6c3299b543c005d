"""Pushing to a local stand-in of the Hub: whole models, in one commit, and nothing that is nobody's business."""

import json
import re
import shutil

import pytest
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.hub_server import TOKEN, HubServer
from tests.support.killing import Commands
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.hub import upload


NAMES = ["text", "code"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer({}, store=tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def commands(server, tmp_path_factory):
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": TOKEN}
    with Commands("ultrafuser.hub.upload", **environment) as commands:
        yield commands


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two fused models: the first in one file and with a chat template, the second in several and without."""
    root = tmp_path_factory.mktemp("models")
    for name, size in (("first", "5GB"), ("second", "20KB")):
        model = UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in NAMES})
        stir_gate(model)
        model.save_pretrained(root / name, max_shard_size=size)
        tokenizer(chat_template=TEMPLATE if name == "first" else None).save_pretrained(root / name)
    return root


@pytest.fixture
def folder(models, tmp_path):
    return shutil.copytree(models / "first", tmp_path / "first")


@pytest.fixture
def seen(commands, tmp_path):
    """What somebody else loads: a fingerprint, or None if nothing loads."""

    def seen(model, revision="main", cache=[0]):  # noqa: B006
        cache[0] += 1
        done = commands.run("load", model, revision, tmp_path / f"cache-{cache[0]}")
        assert done.code is not None
        return done.said.splitlines()[-1] if done.code == 0 else None

    return seen


@pytest.mark.process
def test_what_is_pushed_is_what_was_there_and_nothing_else_goes(folder, commands, server, seen):
    for junk in ("training_args.bin", ".env", "model.safetensors.part", "notes.txt", "credentials.json"):
        (folder / junk).write_text("mine")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "tokenizer.json").write_text("{}")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "gsm8k.yaml").write_text("- value: 1\n")
    done = commands.run("push", folder, "lab/whole")
    assert done.code == 0, done.said
    assert "had no card, so one was written" in done.said
    assert "The licence of `text` is unknown" in done.said
    kept = {f.name for f in folder.iterdir()} & {f.name for f in server.tree("lab/whole")[1].iterdir()}
    assert ".eval_results" in kept
    sent = [f for name in kept for f in (folder / name, *(folder / name).glob("*")) if f.is_file()]
    sizes = sum(f.stat().st_size for f in sent)
    assert re.search(rf"{len(sent)} files, {upload.decimal(sizes)}, to the private model 'lab/whole'", done.said)
    missing = {f.name for f in folder.iterdir()} - kept
    assert missing == {
        *("training_args.bin", ".env", "model.safetensors.part", "notes.txt", "credentials.json", "checkpoint-2")
    }
    assert all(name in done.said for name in missing)
    assert {"modeling_ultrafuser.py", "gates_ultrafuser.py", "README.md", "chat_template.jinja"} <= kept
    assert metadata_load(server.tree("lab/whole")[1] / "README.md")["library_name"] == "transformers"
    lines = done.said.split("To load it:")[1].strip().splitlines()
    pinned = f'"lab/whole", revision="{server.tree("lab/whole")[0]}"'
    assert lines[0] == f"model = AutoModelForCausalLM.from_pretrained({pinned}, trust_remote_code=True)"
    assert seen("lab/whole") == seen(folder)


@pytest.mark.process
def test_an_update_takes_the_earlier_model_s_files_out_and_leaves_other_people_s(
    models, folder, commands, server, seen
):
    assert commands.run("push", folder, "lab/update").code == 0
    _, there = server.tree("lab/update")
    (there / "picture.png").touch()
    done = commands.run("push", models / "second", "lab/update")
    assert done.code == 2
    assert "Of the model that is there now, these go" in done.said
    assert "model.safetensors" in done.said
    assert "chat_template.jinja" in done.said
    assert "Pass --yes" in done.said
    assert seen("lab/update") == seen(folder)
    assert commands.run("push", models / "second", "lab/update", "--yes").code == 0
    _, now = server.tree("lab/update")
    assert (now / "picture.png").exists()
    assert not (now / "model.safetensors").exists()
    assert seen("lab/update") == seen(models / "second") != seen(folder)


@pytest.mark.process
def test_what_the_hub_has_is_not_sent_again(folder, commands, server):
    assert commands.run("push", folder, "lab/again").code == 0
    before, commit = len(server.received), server.tree("lab/again")[0]
    assert commands.run("push", folder, "lab/again").code == 0
    assert len(server.received) == before
    assert server.tree("lab/again")[0] == commit


@pytest.mark.process
def test_a_branch_of_its_own_leaves_main_as_it_is(models, folder, commands, server, seen):
    assert commands.run("push", folder, "lab/branch").code == 0
    done = commands.run("push", models / "second", "lab/branch", "--revision", "v2", "--yes")
    assert done.code == 0, done.said
    commit = server.tree("lab/branch", "v2")[0]
    assert f'from_pretrained("lab/branch", revision="{commit}", trust_remote_code=True)' in done.said
    assert seen("lab/branch") == seen(folder)
    assert seen("lab/branch", "v2") == seen(models / "second")


@pytest.mark.process
def test_private_is_private_or_nothing(folder, commands, server):
    assert "private model" in commands.run("push", folder, "lab/secret", "--private").said
    assert "lab/secret" in server.private
    assert commands.run("push", folder, "lab/new").code == 0
    assert "lab/new" in server.private
    assert "public model" in commands.run("push", folder, "lab/open", "--public").said
    assert "lab/open" not in server.private
    commit = server.tree("lab/open")[0]
    done = commands.run("push", folder, "lab/open", "--private")
    assert done.code == 2
    assert "is to be private, but 'lab/open' is there already" in done.said
    assert server.tree("lab/open")[0] == commit


@pytest.mark.process
@pytest.mark.parametrize(("token", "said"), [("", "no token was found"), ("hf_wrong", "401")])
def test_without_a_token_that_the_hub_knows_nothing_is_sent(token, said, folder, commands, server):
    done = commands.run("push", folder, f"lab/nobody{token}", HF_TOKEN=token)
    assert done.code == 2
    assert said in done.said
    assert f"lab/nobody{token}" not in server.branches


def test_much_is_asked_about_first(folder, monkeypatch):
    asked = []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload, "ASK_ABOVE", 10)
    monkeypatch.setattr(upload, "_there", lambda *_: None)
    monkeypatch.setattr(upload, "HfApi", lambda: None)
    assert upload.push(folder, "lab/large", say=asked.append, agree=lambda: asked.append("?")) is None
    assert asked[-1] == "?"
    assert "files" in asked[-2] or "files" in asked[-3]


def test_a_card_that_a_trainer_wrote_is_told(folder, monkeypatch):
    said = []
    (folder / "README.md").write_text("---\ntags:\n- generated_from_trainer\n- trl\n---\nA model.\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload, "ASK_ABOVE", 10)
    monkeypatch.setattr(upload, "_there", lambda *_: None)
    assert upload.push(folder, "lab/trained", say=said.append, agree=lambda: False) is None
    assert "README.md is a trainer's" in said[0]
    assert (folder / "README.md").read_text().endswith("A model.\n")


def _without(folder, name):
    (folder / name).unlink()


def _cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def _less(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.specialists.code.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _unnamed(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


def _telling(folder):
    (folder / "README.md").write_text("Use my token hf_" + "a" * 34)


def _linked(folder, name):
    (folder.parent / "diary.txt").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "diary.txt")


def _linked_folder(folder):
    (folder.parent / "others").mkdir()
    (folder / "modeling_ultrafuser.py").rename(folder.parent / "others" / "modeling_ultrafuser.py")
    (folder / "modeling_ultrafuser.py").symlink_to("../others/modeling_ultrafuser.py")


def _odd_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')


def _mapped(folder, reference, name="AutoX"):
    (folder.parent / "secret.py").write_text("class Code: pass")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"][name] = reference
    (folder / "config.json").write_text(json.dumps(config))


def _told_in_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "note": "ghp_" + "a" * 36})


def _unsharded(folder):
    model = UltraFuserForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002*")).unlink()
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: _without(folder, "config.json"), "holds no config.json"),
        (lambda folder: _without(folder, "model.safetensors"), "holds no weights"),
        (lambda folder: _without(folder, "gates_ultrafuser.py"), r"lacks \['gates_ultrafuser.py'\]"),
        (lambda folder: _without(folder, "modeling_ultrafuser.py"), r"lacks \['modeling_ultrafuser.py'\]"),
        (lambda folder: _without(folder, "tokenizer.json"), "holds none that loads"),
        (_cut, "cannot be read"),
        (_less, "embed_tokens"),
        (_unsharded, r"lacks \['model-00002"),
        (_pickled, r"only \['pytorch_model.bin'\]"),
        (_unnamed, r"lacks \['AutoConfig', 'AutoModelForCausalLM'\]"),
        (_telling, "looks like one: hf_aaa"),
        (lambda folder: _linked(folder, "LICENSE"), "LICENSE' is a link to"),
        (lambda folder: _linked(folder, "vocab.txt"), "vocab.txt' is a link to"),
        (lambda folder: _linked(folder, "README.md"), "README.md' is a link to"),
        (lambda folder: _linked(folder, "generation_config.json"), "generation_config.json' is a link to"),
        (_linked_folder, "is a link to|lacks"),
        (lambda folder: _mapped(folder, str(folder.parent / "secret") + ".Code"), "auto_map"),
        (lambda folder: _mapped(folder, "../secret.Code"), "auto_map"),
        (lambda folder: _mapped(folder, "somebody/else--secret.Code"), "auto_map"),
        (lambda folder: _mapped(folder, ["folder/secret.Code", None]), "auto_map"),
        (lambda folder: _mapped(folder, {"deeper": "secret.Code"}), "auto_map"),
        (_odd_index, "says in its `weight_map`"),
        (lambda folder: _mapped(folder, None, "AutoConfig"), r"lacks \['AutoConfig'\]"),
        (_told_in_weights, "looks like one: ghp_"),
    ],
)
def test_what_is_not_whole_or_gives_away_a_secret_is_refused(spoil, said, folder, monkeypatch):
    spoil(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # a request would fail otherwise: tests are offline
    with pytest.raises(ValueError, match=said):
        upload.push(folder, "lab/model")


@pytest.mark.process
def test_where_specialists_lay_on_this_machine_is_not_sent(folder, commands, server):
    home = "/home/somebody/private work/text"
    records = {
        "text": {"source": home, "commit": None, "problem": "its folder holds no README.md"},
        "code": {"source": "lab/code", "commit": "abc", "licence": "mit"},
    }
    (folder / "specialists.json").write_text(json.dumps(records))
    assert commands.run("push", folder, "lab/paths").code == 0
    _, there = server.tree("lab/paths")
    assert not [p for p in there.rglob("*") if p.is_file() and b"/home/somebody" in p.read_bytes()]
    sent = json.loads((there / "specialists.json").read_text())
    assert sent["text"]["source"] == "text"
    assert sent["code"] == records["code"]
    assert json.loads((folder / "specialists.json").read_text()) == records


def test_every_file_that_saving_writes_is_sent(models):
    for folder in models.iterdir():
        assert {f.name for f in folder.iterdir()} == set(upload.whole_model(folder))
        AutoTokenizer.from_pretrained(folder)
