"""What a user finds who has transformers and a saved folder, but none of our packages.

Run by `test_saving.py` in a process of its own: `python clean_process.py FOLDERS FUSED_V1`. It checks every fact
below, and writes `report.json`: for each fact "holds", or how it failed.
"""

import json
import os
import sys
import traceback
from pathlib import Path


OURS = ("modeling_ultrafuser", "trainers", "ultrafuser", "tests")
REMOTE = {"trust_remote_code": True}


def _load(name, auto_class=None, **kwargs):
    import transformers

    auto_class = auto_class or transformers.AutoModelForCausalLM
    return auto_class.from_pretrained(FOLDERS / name, **REMOTE, **kwargs)


def _expected(name):
    from safetensors.torch import load_file

    return load_file(FOLDERS / name / "expected.safetensors")


def _assert_equal_logits(model, name):
    import torch

    expected = _expected(name)
    with torch.no_grad():
        outputs = model(expected["input_ids"])
    assert torch.equal(outputs.logits, expected["logits"])
    assert torch.equal(outputs.gate_weights, expected["gate_weights"])


def _assert_loads_whole(name, **kwargs):
    model, info = _load(name, output_loading_info=True, **kwargs)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(info.values()), info
    _assert_equal_logits(model, name)
    return model


def _raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")


def our_packages_cannot_be_imported():
    for name in OURS:
        _raised(ImportError, lambda name=name: __import__(name))


def a_folder_without_trust_is_refused():
    from transformers import AutoModelForCausalLM

    for trust in ({}, {"trust_remote_code": False}):
        load = lambda trust=trust: AutoModelForCausalLM.from_pretrained(FOLDERS / "plain", **trust)  # noqa: E731
        assert "trust_remote_code=True" in _raised(ValueError, load)


def a_folder_loads_whole_by_its_absolute_path():
    _assert_loads_whole("plain")


def a_folder_loads_whole_by_a_relative_path():
    from transformers import AutoModelForCausalLM

    before = os.getcwd()
    for place, path in (("plain", "."), ("", "plain"), ("", "./plain/"), ("bfloat16", "../plain")):
        os.chdir(FOLDERS / place)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **REMOTE)
        finally:
            os.chdir(before)
        _assert_equal_logits(model, "plain")


def the_order_of_specialists_is_kept():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(FOLDERS / "plain", **REMOTE)
    assert config.specialist_names == ["text", "code", "math"]
    assert [c.num_hidden_layers for c in config.specialists] == [2, 3, 4]
    assert config.text is config.specialists[0]
    assert list(_load("plain").model.specialists) == ["text", "code", "math"]


def the_backbone_loads_and_leaves_only_the_head():
    import torch
    from transformers import AutoModel

    backbone, info = _load("plain", AutoModel, output_loading_info=True)
    assert type(backbone).__name__ == "UltraFuserModel"
    assert {key: set(keys) for key, keys in info.items() if keys} == {"unexpected_keys": {"lm_head.weight"}}
    head = _load("plain").lm_head
    expected = _expected("plain")
    with torch.no_grad():
        assert torch.equal(head(backbone(expected["input_ids"]).last_hidden_state), expected["logits"])


def a_pipeline_continues_text():
    from transformers import pipeline

    speak = pipeline("text-generation", model=str(FOLDERS / "plain"), **REMOTE)
    assert type(speak.model).__module__.startswith("transformers_modules.")
    answers = json.loads((FOLDERS / "plain" / "answers.json").read_text())
    said = speak(answers["prompt"], max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"] == answers["text"]


def a_pipeline_answers_chat_messages():
    from transformers import pipeline

    speak = pipeline("text-generation", model=str(FOLDERS / "plain"), **REMOTE)
    answers = json.loads((FOLDERS / "plain" / "answers.json").read_text())
    said = speak(answers["messages"], max_new_tokens=8, do_sample=False)
    assert said[0]["generated_text"] == [*answers["messages"], {"role": "assistant", "content": answers["chat"]}]


def a_mixture_of_probabilities_loads_whole():
    assert _assert_loads_whole("probabilities").config.fusion == "probabilities"


def late_rules_load_whole():
    assert _assert_loads_whole("contrast").config.fusion == "contrast:0.5,0.1,text"
    assert _assert_loads_whole("dynamic").config.fusion == "dynamic:text,math"


def bfloat16_loads_whole_and_its_gate_stays_float32():
    import torch

    model = _assert_loads_whole("bfloat16", dtype="auto")
    dtypes = {name.startswith("model.fusion_gate."): set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        dtypes[name.startswith("model.fusion_gate.")].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def a_folder_of_several_files_loads_whole():
    assert len(list((FOLDERS / "sharded").glob("model-*.safetensors"))) > 2
    _assert_loads_whole("sharded")


def parts_can_stay_on_the_disk():
    import torch

    parts = {"specialists.text": "cpu", "specialists.code": "disk", "specialists.math": "cpu", "fusion_gate": "cpu"}
    device_map = {f"model.{part}": place for part, place in parts.items()} | {"lm_head": "disk"}
    model = _load("plain", device_map=device_map, offload_folder=str(FOLDERS / "offload"))
    assert model.lm_head.weight.device == torch.device("meta")
    assert model.model.specialists["code"].embed_tokens.weight.device == torch.device("meta")
    _assert_equal_logits(model, "plain")


def a_score_is_read_off_the_same_backbone():
    import transformers

    model = _load("plain", transformers.AutoModelForSequenceClassification, num_labels=1)
    assert type(model).__module__.startswith("transformers_modules.")
    assert model.score.weight.shape == (1, model.config.hidden_size)


def a_tokenizer_loads_without_trust():
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(FOLDERS / "plain", trust_remote_code=False)("a").input_ids


def a_folder_saved_again_loads_whole():
    from safetensors.torch import save_file

    _load("plain").save_pretrained(FOLDERS / "again")
    save_file(_expected("plain"), FOLDERS / "again" / "expected.safetensors")
    _assert_loads_whole("again")
    configs = [json.loads((FOLDERS / name / "config.json").read_text()) for name in ("plain", "again")]
    assert configs[0] == configs[1]
    code = [{f.name: f.read_text() for f in (FOLDERS / name).glob("*.py")} for name in ("plain", "again")]
    assert code[0] == code[1]


def a_specialist_can_be_had_back():
    import torch
    from transformers import AutoModelForCausalLM

    _load("plain").specialist("code").save_pretrained(FOLDERS / "code")
    model = AutoModelForCausalLM.from_pretrained(FOLDERS / "code")
    assert type(model).__module__.startswith("transformers.models.llama.")
    expected = _expected("plain")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["code_logits"])


def a_folder_of_format_1_runs_with_its_own_code():
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(FUSED_V1, **REMOTE, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(info.values()), info
    expected = load_file(FUSED_V1 / "expected.safetensors")
    with torch.no_grad():
        outputs = model(expected["input_ids"])
    torch.testing.assert_close(outputs.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.gate_weights, expected["gate_weights"], rtol=1e-5, atol=1e-5)


FACTS = {name: fact for name, fact in list(globals().items()) if callable(fact) and not name.startswith("_")}
del FACTS["Path"]


def _report() -> dict[str, str]:
    report = {}
    for name, fact in FACTS.items():
        try:
            fact()
            report[name] = "holds"
        except Exception:
            report[name] = traceback.format_exc()
    return report


if __name__ == "__main__":
    FOLDERS, FUSED_V1 = map(Path, sys.argv[1:])
    for package in OURS:
        sys.modules[package] = None
    import torch

    torch.set_num_threads(1)
    (FOLDERS / "report.json").write_text(json.dumps(_report()))
