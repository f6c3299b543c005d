"""A fused model travels as one folder: what is saved here is the same model where our packages are not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.compat_ultrafuser import CACHE
from tests.fixtures.fused_v1.configuration_ultrafuser import UltraFuserConfig as OldConfig
from tests.fixtures.make_fused_v1 import FOLDER as FUSED_V1
from tests.fixtures.make_fused_v1 import TEMPLATE
from tests.fixtures.make_fused_v2 import FOLDER as FUSED_V2
from tests.support import clean_process
from tests.support.tiny import specialist, stir_gate, tokenizer


MESSAGES = [{"role": "user", "content": "What is 6 * 7?"}]


def three_specialists(dtype=torch.float32):
    set_seed(0)
    return {
        "text": specialist(layers=2).to(dtype),
        "code": specialist(layers=3, tied=True).to(dtype),
        "math": specialist(layers=4, hidden_size=48).to(dtype),
    }


def save(folder, *, dtype=torch.float32, max_shard_size="1GB", **choices):
    specialists = three_specialists(dtype)
    model = UltraFuserForCausalLM.from_specialists(specialists, **choices)
    stir_gate(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    ids = torch.randint(3, 99, (2, 12))
    with torch.no_grad():
        outputs = model(ids)
        code_logits = specialists["code"](ids).logits
    expected = {"input_ids": ids, "logits": outputs.logits, "gate_weights": outputs.gate_weights}
    save_file(expected | {"code_logits": code_logits.clone()}, folder / "expected.safetensors")
    return model


def answer(model, words, prompt):
    ids = words(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    said = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return words.decode(said, skip_special_tokens=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = tmp_path_factory.mktemp("folders")
    model = save(folders / "plain")
    words = tokenizer(chat_template=TEMPLATE)
    words.save_pretrained(folders / "plain")
    chat = words.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    answers = {
        "prompt": "def f(x):",
        "text": answer(model, words, "def f(x):"),
        "messages": MESSAGES,
        "chat": answer(model, words, chat),
    }
    (folders / "plain" / "answers.json").write_text(json.dumps(answers))
    save(folders / "bfloat16", dtype=torch.bfloat16)
    save(folders / "sharded", max_shard_size="100KB", gate="linear")
    save(folders / "probabilities", fusion="probabilities", gate="constant")
    save(folders / "contrast", fusion="contrast:0.5,0.1,text")
    save(folders / "dynamic", fusion="dynamic:text,math", gate="uniform")
    return folders


@pytest.fixture(scope="module")
def clean(folders, tmp_path_factory):
    """What one process without our packages found."""
    home = tmp_path_factory.mktemp("clean")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(home / "modules"), "HF_HOME": str(home / "hf")}
    command = [sys.executable, clean_process.__file__, folders, FUSED_V1]
    subprocess.run(command, cwd=home, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=300)
    return json.loads((folders / "report.json").read_text())


@pytest.mark.process
@pytest.mark.parametrize("fact", clean_process.FACTS)
def test_in_a_process_without_our_packages(fact, clean):
    if fact == "a_folder_of_format_1_runs_with_its_own_code" and CACHE == "cache":
        pytest.skip("its own code is older than this version's name of the cache")
    assert clean[fact] == "holds", clean[fact]


@pytest.mark.e2e
def test_a_saved_folder_holds_the_code_that_it_needs_and_no_more(folders):
    code = {f.name for f in (folders / "plain").glob("*.py")}
    ours = {f.name for f in Path(sys.modules["modeling_ultrafuser"].__file__).parent.glob("*.py")}
    assert code == ours - {"__init__.py"}
    auto_map = json.loads((folders / "plain" / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}


def test_saved_tensors_are_the_specialists_and_one_head(folders):
    names = set(load_file(folders / "plain" / "model.safetensors"))
    parts = {".".join(n.split(".")[:3]) for n in names if n.startswith("model.specialists.")}
    assert parts == {f"model.specialists.{n}" for n in ("text", "code", "math")}
    rest = {n for n in names if not n.startswith(("model.specialists.", "model.fusion_gate."))}
    assert rest == {"lm_head.weight"}


def test_the_installed_classes_win_over_the_code_in_the_folder(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain", trust_remote_code=True)
    assert type(model) is UltraFuserForCausalLM
    expected = load_file(folders / "plain" / "expected.safetensors")
    with torch.no_grad():
        assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])


def test_a_configuration_comes_back_as_it_was(folders, tmp_path):
    AutoConfig.from_pretrained(folders / "plain").save_pretrained(tmp_path)
    written = [json.loads((folder / "config.json").read_text()) for folder in (folders / "plain", tmp_path)]
    assert written[0] == written[1]


FORMATS = {FUSED_V1: ["text", "code", "math"], FUSED_V2: ["text", "code"]}


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_a_folder_of_every_format_loads_with_the_installed_code(folder):
    """Never to be weakened: users have such folders. If it fails, the code must learn to read them."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is UltraFuserForCausalLM
    assert not any(info.values()), info
    assert model.config.specialist_names == FORMATS[folder]
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        outputs = model(expected["input_ids"])
    torch.testing.assert_close(outputs.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.gate_weights, expected["gate_weights"], rtol=1e-5, atol=1e-5)


def test_code_that_knows_format_1_refuses_a_folder_of_format_2():
    config = json.loads((FUSED_V2 / "config.json").read_text())
    with pytest.raises(ValueError, match="up to format 1, but this one is in format 2"):
        OldConfig(**config)


def test_a_folder_says_which_format_it_is_in(folders):
    assert json.loads((folders / "plain" / "config.json").read_text())["format_version"] == 1
    assert UltraFuserConfig().format_version == 1


@pytest.mark.parametrize("version", [3, 0, "1.5", None])
def test_a_folder_in_a_format_that_this_code_does_not_know_is_refused(version, folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    # a newer format may also bring choices that this code would call mistakes
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": version, "gate": "oracle"}))
    with pytest.raises(ValueError, match=f"up to format 2, but .* format {version!r}.*Install a newer checkout"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_onto_the_meta_device_is_told_as_the_library_tells_it_and_blames_no_file(tmp_path):
    UltraFuserForCausalLM.from_specialists({"text": specialist(), "code": specialist()}).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="meta device context"), torch.device("meta"):
        UltraFuserForCausalLM.from_pretrained(tmp_path)


@pytest.mark.grid
@pytest.mark.parametrize("option", [{"unknown": 1}, {"dtype": "float99"}, {"attn_implementation": "none such"}])
def test_an_option_that_cannot_be_is_named_before_a_file_is_blamed(option, tmp_path):
    names = {"a": specialist(), "b": specialist()}
    UltraFuserForCausalLM.from_specialists(names).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"One of the options {re.escape(str(list(option)))} is not what can be"):
        UltraFuserForCausalLM.from_pretrained(tmp_path, **option)
