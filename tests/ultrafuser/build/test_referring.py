"""Reference recipes: a fused model without its specialists, and the whole folder from it again, bit by bit."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.fusions import MIXTURES
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.cli.app import app


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
IDS = torch.arange(3, 40)[None]


def run(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, " ".join(result.output.replace("│", "").split())


@pytest.fixture
def models(tmp_path):
    """Folders of three specialists: of several sizes, one tied, one with a larger vocabulary, templates that differ."""
    for name, fields in {"text": {}, "code": {"tied": True}, "math": {"hidden_size": 48, "vocab_size": 104}}.items():
        specialist(layers=1, **fields).save_pretrained(tmp_path / "models" / name)
        tokenizer(chat_template=TEMPLATE + name).save_pretrained(tmp_path / "models" / name)
    return {name: tmp_path / "models" / name for name in ("text", "code", "math")}


@pytest.fixture
def fuse(models, tmp_path):
    """Fuses, and gives the gate opinions, as stage one does."""

    def fuse(*choices):
        code, said = run(
            *("fuse", *(f"{n}={f}" for n, f in models.items())),
            *("--out", tmp_path / "fused", "--chat-template", "code", *choices),
        )
        assert code == 0, said
        model = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
        stir_gate(model)
        model.save_pretrained(tmp_path / "fused")
        return tmp_path / "fused"

    return fuse


def refer(folder):
    """The recipe's file."""
    out = folder.with_name("refs")
    code, said = run("refer", folder, "--out", out)
    assert code == 0, said
    return out / "refs.yaml"


def assert_equal_folders(one, other):
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    same, *rest = filecmp.cmpfiles(one, other, names, shallow=False)
    assert rest == [[], []]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {*same}


@pytest.mark.e2e
@pytest.mark.parametrize("fusion", MIXTURES)
def test_the_default_gate_comes_back_with_its_temperatures(fusion, fuse, tmp_path):
    fused = fuse("--fusion", fusion)
    assert run("fuse", refer(fused), "--out", tmp_path / "again")[0] == 0
    one, again = (UltraFuserForCausalLM.from_pretrained(folder) for folder in (fused, tmp_path / "again"))
    assert (one.config.gate, one.config.gate_hidden_size, one.config.gate_calibration) == ("cross", 128, True)
    with torch.no_grad():
        said, said_again = one(IDS), again(IDS)
    assert (said.logit_scales - 1).abs().max() > 0.1, "the temperatures are not stirred"
    assert torch.equal(said_again.logit_scales, said.logit_scales)
    assert torch.equal(said_again.logits, said.logits)


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize(
    "choices",
    [
        (),
        ("--gate", "mlp"),
        ("--gate", "linear", "--fusion", "probabilities"),
        ("--gate", "constant", "--dtype", "bfloat16"),
        ("--gate", "anchor:code+calibration"),
        ("--gate", "uniform"),
    ],
)
def test_the_folder_comes_back_byte_for_byte_from_what_is_not_the_specialists(choices, fuse, tmp_path):
    fused = fuse(*choices)
    recipe = refer(fused)
    assert {path.name for path in recipe.parent.iterdir()} == {
        *("refs.yaml", "gate.safetensors", "config.json", "generation_config.json")
    }
    assert all(key.startswith("model.fusion_gate.") for key in load_file(recipe.with_name("gate.safetensors")))
    code, said = run("fuse", recipe, "--out", tmp_path / "again")
    assert code == 0, said
    assert "To load it" in said
    assert_equal_folders(fused, tmp_path / "again")


@pytest.mark.e2e
def test_a_recipe_grows_with_the_gate_and_not_with_the_specialists(models, fuse):
    recipe = refer(fuse())
    gate = recipe.with_name("gate.safetensors").stat().st_size
    # the hidden layer of the default gate, 128 wide; then three scores and a temperature of it and of all hidden states
    numbers = 128 * (32 + 32 + 48 + 1) + 4 * (128 + 32 + 32 + 48 + 1)
    assert 4 * numbers <= gate < 4 * numbers + 1000
    assert sum(path.stat().st_size for path in recipe.parent.iterdir()) - gate < 10_000


@pytest.mark.e2e
def test_adapters_of_one_base_come_back_too_and_the_base_is_checked_with_them(tmp_path):
    base = tmp_path / "base"
    specialist(layers=1).save_pretrained(base)
    tokenizer(chat_template=TEMPLATE).save_pretrained(base)
    for name in ("text", "code"):
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
        adapted.save_pretrained(tmp_path / name)
    words = [f"{name}={tmp_path / name}" for name in ("text", "code")]
    assert run("fuse", *words, "--out", tmp_path / "fused")[0] == 0
    recipe = refer(tmp_path / "fused")
    assert "chat_template: text" in recipe.read_text()
    code, said = run("fuse", recipe, "--out", tmp_path / "again")
    assert code == 0, said
    assert_equal_folders(tmp_path / "fused", tmp_path / "again")
    other = tmp_path / "base" / "model.safetensors"
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    code, said = run("fuse", recipe, "--out", tmp_path / "third")
    assert code == 2
    assert str(other) in said


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("change", ["template", "no template", "words"])
def test_a_tokenizer_that_no_specialist_has_is_kept(change, fuse, tmp_path):
    fused = fuse()
    words = AutoTokenizer.from_pretrained(fused)
    if change == "words":
        words.add_tokens(["<new>"])
    else:
        words.chat_template = "{{ messages }}" if change == "template" else None
    (fused / "chat_template.jinja").unlink()
    words.save_pretrained(fused)
    recipe = refer(fused)
    # which may be large
    assert recipe.with_name("tokenizer.json").exists() == (change == "words")
    assert run("fuse", recipe, "--out", tmp_path / "again")[0] == 0
    assert_equal_folders(fused, tmp_path / "again")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.specialists.code.layers.0.mlp.up_proj.weight", "1 of 'code' ({code}), the first is `layers.0.mlp"),
        ("lm_head.weight", "1 of 'math' ({math}), the first is `head`"),
    ],
)
def test_a_model_whose_specialists_were_trained_is_refused_by_the_tensor(key, said, models, fuse, tmp_path):
    fused = fuse()
    model = UltraFuserForCausalLM.from_pretrained(fused)
    with torch.no_grad():
        # the last column of the head is the last specialist's
        model.get_parameter(key)[0, -1] += 1e-6
    model.save_pretrained(fused)
    code, output = run("refer", fused, "--out", tmp_path / "refs")
    assert code == 2
    assert said.format(**models) in output
    assert "ultrafuser push FOLDER" in output
    assert not list(tmp_path.glob("refs*"))


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("spoilt", ["refs/gate.safetensors", "refs/config.json", "models/code/model.safetensors"])
def test_a_file_that_is_not_the_one_is_refused_with_both_hashes_and_nothing_is_written(spoilt, fuse, tmp_path):
    recipe = refer(fuse())
    written = yaml.safe_load(recipe.read_text())
    file = tmp_path / spoilt
    own, theirs = written["sha256"], written["specialist_sha256"]["code"]
    expected = own[file.name] if "refs" in spoilt else theirs[file.name]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, said = run("fuse", recipe, "--out", tmp_path / "again")
    assert code == 2
    found = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
    assert all(word in said for word in (file.name, expected, found))
    assert not list(tmp_path.glob("again*"))


@pytest.mark.e2e
def test_a_file_that_is_gone_is_named(models, fuse, tmp_path):
    recipe = refer(fuse())
    (models["math"] / "chat_template.jinja").unlink()
    code, said = run("fuse", recipe, "--out", tmp_path / "again")
    assert code == 2
    assert "chat_template.jinja' is not there" in said


@pytest.mark.e2e
def test_interrupted_it_leaves_nothing(fuse, tmp_path, monkeypatch):
    recipe = refer(fuse())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(UltraFuserForCausalLM, "save_pretrained", interrupted)
    assert CliRunner().invoke(app, ["fuse", str(recipe), "--out", str(tmp_path / "again")]).exit_code != 0
    assert not list(tmp_path.glob("again*"))


@pytest.mark.e2e
def test_a_folder_that_does_not_say_where_its_specialists_are_asks(models, fuse, tmp_path):
    fused = fuse()
    (fused / "specialists.json").unlink()
    code, said = run("refer", fused, "--out", tmp_path / "refs")
    assert code == 2
    assert "--specialists NAME=ID" in said
    named = [word for n, f in models.items() for word in ("--specialists", f"{n}={f}")]
    assert run("refer", fused, "--out", tmp_path / "refs", *named)[0] == 0


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gate", "linear"], "leaves nothing to choose"),
        (["--dtype", "float16"], "leaves nothing to choose"),
        (["--dry-run"], "can be fused"),
    ],
)
def test_a_reference_recipe_leaves_nothing_to_choose(words, said, fuse, tmp_path):
    recipe = refer(fuse())
    code, output = run("fuse", recipe, "--out", tmp_path / "again", *words)
    assert code == (0 if words == ["--dry-run"] else 2)
    assert said in output
    assert not (tmp_path / "again").exists()


@pytest.mark.e2e
def test_a_recipe_with_a_field_of_a_later_version_is_refused(fuse, tmp_path):
    recipe = refer(fuse())
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "deltas": {}}))
    code, said = run("fuse", recipe, "--out", tmp_path / "again")
    assert code == 2
    assert "['deltas']" in said


COMMANDS = """
import sys
from typer.testing import CliRunner
from ultrafuser.cli.app import app
for words in (["fuse", "text=owner/text", "code=owner/code", "--out", "fused"], ["refer", "fused", "--out", "refs"],
              ["fuse", "refs/refs.yaml", "--out", "again"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exc_info)
"""


@pytest.mark.slow
def test_specialists_on_the_hub_are_read_from_its_cache_at_their_commits(tmp_path):
    commits = {"text": "1" * 40, "code": "2" * 40}
    for name, commit in commits.items():
        repository = tmp_path / "hub" / f"models--owner--{name}"
        specialist(layers=1).save_pretrained(repository / "snapshots" / commit)
        tokenizer(chat_template=TEMPLATE).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = yaml.safe_load((tmp_path / "refs" / "refs.yaml").read_text())
    assert written["specialists"] == {"text": "owner/text", "code": "owner/code"}
    assert written["specialist_revisions"] == commits
    assert_equal_folders(tmp_path / "fused", tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "specialists.json").read_text())
    assert {name: about["commit"] for name, about in kept.items()} == commits
