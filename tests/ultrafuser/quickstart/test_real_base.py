"""The base of the real quickstart: what is refused before anything large is read, and the folder of a GGUF file."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from modeling_ultrafuser.files_ultrafuser import read_json
from tests.support import small_real
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.gguf_files import write
from tests.support.mixes import prompt
from tests.support.tiny import specialist, tokenizer
from ultrafuser.cli.app import app
from ultrafuser.licences import read_ingredient
from ultrafuser.quickstart.real_base import COMMIT, MODEL, check_adapters, check_base, gguf_tokenizer, write_folder
from ultrafuser.quickstart.real_data import HERE, Materials


SMOLLM = {"tokenizer.ggml.pre": "smollm", "tokenizer.chat_template": CHAT_TEMPLATE, "general.license": "mit"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_real.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def file(made, tmp_path):
    """The base as a GGUF file."""
    pytest.importorskip("gguf")
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    return write(tmp_path / "base.gguf", base, fields=SMOLLM, merged=True)


def test_a_base_of_the_adapters_is_read_without_its_weights(made):
    source = check_base(str(made / "base"), small_real.materials(made).adapters)
    assert source.location == str(made / "base")


@pytest.mark.parametrize("folder", sorted((HERE / "specialists").iterdir()), ids=lambda folder: folder.name)
def test_a_shipped_adapter_fits_the_base_that_its_card_names(folder):
    assert folder.name in Materials().adapters
    assert read_ingredient(folder.name, str(folder)).licence == "apache-2.0"
    config = read_json(folder / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (MODEL, COMMIT)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    check_adapters(MODEL, LlamaConfig(**sizes, **heads), {folder.name: folder})
    with pytest.raises(ValueError, match="is not the base of the adapter"):
        check_adapters("another", LlamaConfig(**sizes | {"hidden_size": 1152}, **heads), {folder.name: folder})


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing folder", ["no folder here", "a repository on the Hub. ", "--base FILE.gguf"]),
        ("missing file", ["base.gguf' of 'base' is not there", "The base is a folder, a GGUF file", "--base FOLDER"]),
        ("another size", ["is not the base of the adapter 'math'", "are adapters of HuggingFaceTB/SmolLM2", "--base"]),
        ("no tokenizer", ["has no tokenizer", "a chat template puts into words", "Pass --base"]),
        ("no template", ["a tokenizer without a chat template", "a chat template puts into words", "Pass --base"]),
    ],
)
def test_a_base_that_will_not_do_is_refused_with_fact_rule_and_way_out(fault, words, made, tmp_path, monkeypatch):
    base = tmp_path / ("base.gguf" if fault == "missing file" else "base")
    if not fault.startswith("missing"):
        specialist(hidden_size=64 if fault == "another size" else 32, tied=True).save_pretrained(base)
    if fault == "no template":
        tokenizer().save_pretrained(base)
    monkeypatch.setattr("ultrafuser.quickstart.real.Materials", lambda: small_real.materials(made))
    done = CliRunner().invoke(app, ["quickstart", "--real", "--base", str(base), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    places = [said.find(word) for word in words]
    assert -1 not in places, said
    assert places == sorted(places), said
    assert not (tmp_path / "out").exists()


def test_a_base_is_of_the_real_quickstart_alone():
    done = CliRunner().invoke(app, ["quickstart", "--base", "somewhere"])
    assert done.exit_code == 2
    assert "--real" in done.output


def test_a_gguf_file_becomes_an_ordinary_folder(made, file, tmp_path):
    write_folder(str(file), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: mit\n---\n")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    base, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in (made / "base", tmp_path))
    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, base(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(("pre", "words"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_digits_are_split_as_the_vocabulary_was_learned(pre, words, made, tmp_path):
    pytest.importorskip("gguf")
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    file = write(tmp_path / "base.gguf", base, fields={"tokenizer.ggml.pre": pre}, merged=True)
    assert gguf_tokenizer(str(file)).tokenize("x12") == ["x", *words]
