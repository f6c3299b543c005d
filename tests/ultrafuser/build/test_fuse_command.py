"""Fusing from the command line: whole folders or none, nothing overwritten, ingredients kept."""

import json
import shutil

import pytest
import torch
import yaml
from filelock import FileLock
from huggingface_hub import metadata_load
from rich.filesize import decimal
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from tests.support.tiny import specialist, tokenizer
from ultrafuser.build.fusion_recipe import FusionRecipe, FusionSettings
from ultrafuser.cli.app import app


NAMES = ["text", "code", "math"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three specialists, of several sizes."""
    root = tmp_path_factory.mktemp("models")
    for name, layers, size in zip(NAMES, (2, 1, 1), (32, 32, 48), strict=True):
        specialist(layers=layers, hidden_size=size, tied=name == "code").save_pretrained(root / name)
        tokenizer(chat_template=TEMPLATE).save_pretrained(root / name)
        (root / name / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    return {name: root / name for name in NAMES}


def run(*words):
    result = CliRunner().invoke(app, ["fuse", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def pairs(models):
    return [f"{name}={folder}" for name, folder in models.items()]


@pytest.mark.e2e
def test_the_folder_is_what_fusing_in_python_gives_and_the_printed_lines_load_it(models, tmp_path):
    out = tmp_path / "fused"
    code, said = run(*pairs(models), "--out", out, "--gate", "linear")
    assert code == 0, said
    lines = said.split("To load it:")[1].strip().splitlines()
    assert len(lines) == 2
    found = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer}
    exec("\n".join(lines), found)
    expected = UltraFuserForCausalLM.from_specialists(models, gate="linear")
    assert torch.equal(found["model"](IDS).logits, expected(IDS).logits)
    assert found["model"].config.gate == "linear"
    assert found["tokenizer"].chat_template == TEMPLATE
    assert {"modeling_ultrafuser.py", "generation_config.json"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]
    for k, name in enumerate(NAMES, start=1):
        assert f"{name} ({k} of 3): {models[name]}" in said


@pytest.mark.e2e
def test_a_recipe_says_the_same_as_flags_and_flags_go_before_it(models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    specialists = {name: str(folder) for name, folder in models.items()}
    written = {"specialists": specialists, "gate": "constant", "dtype": "bfloat16", "out": str(tmp_path / "one")}
    recipe.write_text(yaml.safe_dump(written))
    assert run(recipe)[0] == 0
    assert run(recipe, "--out", tmp_path / "two", "--gate", "uniform", "--dtype", "float32")[0] == 0
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert (one["gate"], one["dtype"]) == ("constant", "bfloat16")
    assert (two["gate"], two["dtype"]) == ("uniform", "float32")
    recipe.write_text(yaml.safe_dump({**written, "domains": {}, "gates": "mlp"}))
    code, said = run(recipe, "--out", tmp_path / "three")
    assert code == 2
    assert "['domains', 'gates']" in said
    assert "ultrafuser train" in said


@pytest.mark.e2e
def test_a_dry_run_tells_the_size_to_the_byte_and_writes_nothing(models, tmp_path):
    size = FusionRecipe(FusionSettings({n: str(f) for n, f in models.items()})).plan().numbers["disk"]
    code, said = run(*pairs(models), "--dry-run")
    assert code == 0
    assert decimal(size) in said
    assert "can be fused" in said
    assert not list(tmp_path.iterdir())
    assert run(*pairs(models), "--out", tmp_path / "fused")[0] == 0
    with safe_open(tmp_path / "fused" / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    assert size == sum(t.numel() * t.element_size() for t in tensors)


def test_nothing_is_overwritten(models, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, said = run(*pairs(models), "--out", tmp_path)
    assert code == 2
    assert "not empty" in said
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_another_process_is_writing_is_left_to_it(models, tmp_path):
    part = tmp_path / "fused.part"
    part.mkdir()
    (part / "half").touch()
    with FileLock(part / ".ultrafuser.lock"):
        code, said = run(*pairs(models), "--out", tmp_path / "fused")
    assert code == 2
    assert "another one is writing" in said
    assert (part / "half").exists()


def test_a_gate_is_one_word(models, tmp_path):
    words = [f"{name}={models[name]}" for name in ("text", "code")]
    code, said = run(*words, "--gate", "cross:8+calibration", "--out", tmp_path / "fused")
    assert code == 0, said
    config = UltraFuserConfig.from_pretrained(tmp_path / "fused")
    assert (config.gate, config.gate_hidden_size, config.gate_calibration) == ("cross", 8, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text={text}"], "at least two specialists"),
        (["text={text}", "code={code}", "--revision", "math=main"], "revisions of those"),
        (["text={text}", "code=/nowhere/at/all"], "'code'"),
        (["text={text}", "code={code}", "--gate", "moe"], "But got 'moe'"),
        (["text={text}", "odd={odd}"], "different tokenizer"),
        (["text={text}", "text={code}"], "a name each"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(words, said, models, tmp_path):
    odd = tmp_path / "odd"
    specialist().config.save_pretrained(odd)
    tokenizer(swap="ab", chat_template=TEMPLATE).save_pretrained(odd)
    words = [word.format(**models, odd=odd) for word in words]
    code, output = run(*words, "--out", tmp_path / "fused")
    assert code == 2
    assert said in " ".join(output.replace("│", "").split())
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]


def test_a_disk_that_is_too_small_is_told_first(models, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    code, said = run(*pairs(models), "--out", tmp_path / "fused")
    assert code == 2
    assert "1 byte are free" in said
    assert not list(tmp_path.iterdir())


def test_the_card_knows_what_was_fused_without_being_told(models, tmp_path):
    assert run(*pairs(models), "--out", tmp_path / "fused")[0] == 0
    assert CliRunner().invoke(app, ["card", str(tmp_path / "fused")]).exit_code == 0
    metadata = metadata_load(tmp_path / "fused" / "README.md")
    assert metadata["license"] == "mit"
    # a folder on this machine is no model on the Hub
    assert "base_model" not in metadata


@pytest.mark.e2e
def test_a_model_of_the_hub_is_fused_from_the_cache_and_its_commit_is_kept(models, tmp_path, monkeypatch):
    commits = {}
    for k, (name, folder) in enumerate(models.items()):
        commits[name] = f"{k}" * 40
        repository = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, repository / "snapshots" / commits[name])
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commits[name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "fused"
    code, said = run(*(f"{name}=owner/{name}" for name in NAMES), "--out", out)
    assert code == 0, said
    expected = UltraFuserForCausalLM.from_specialists(models)
    assert torch.equal(UltraFuserForCausalLM.from_pretrained(out)(IDS).logits, expected(IDS).logits)
    kept = json.loads((out / "specialists.json").read_text())
    assert kept == {n: {"source": f"owner/{n}", "commit": commits[n], "licence": "mit"} for n in NAMES}
    assert CliRunner().invoke(app, ["card", str(out)]).exit_code == 0
    assert metadata_load(out / "README.md")["base_model"] == [f"owner/{n}" for n in NAMES]
