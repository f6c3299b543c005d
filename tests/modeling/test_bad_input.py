"""Every mistake gets a sentence with the rule, what came, and the way out, before anything large is loaded."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    set_seed,
)

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from tests.support.checkpoints import save, saying
from tests.support.tiny import specialist


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A specialist's folder in which nothing is wrong."""
    set_seed(0)
    return save(specialist(layers=1, hidden_size=16), tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def fused_folder(tmp_path_factory):
    set_seed(0)
    return save(three(gate="linear"), tmp_path_factory.mktemp("fused"))


def three(**choices):
    models = {name: specialist(layers=1, hidden_size=16) for name in ("text", "code", "math")}
    return UltraFuserForCausalLM.from_specialists(models, **choices)


def two_configs():
    return [specialist(layers=1, hidden_size=16).config for _ in range(2)]


@pytest.fixture
def fuse_without_loading(good, monkeypatch):
    """Fuses a good specialist with another, and fails the test if a weight is read on the way."""

    def reached(*args, **kwargs):
        pytest.fail("weights were about to be loaded")

    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        monkeypatch.setattr(auto_class, "from_pretrained", reached)
    return lambda other, **choices: UltraFuserForCausalLM.from_specialists({"text": good, "other": other}, **choices)


# ---------------------------------------------------------------------------------- names and number


UNUSABLE = [
    *("0", "7b", 0, None, "", "a.b", "my model", "my-model", "class", "naïve", "_text", "a/b"),
    *("keys", "values", "items", "pop", "forward", "training"),
    *("vocab_size", "hidden_size", "layer_types", "specialists", "fusion", "use_cache", "dtype", "architectures"),
    *("head_dim", "num_hidden_layers", "format_version", "model_type", "auto_map", "quantization_config", "to_dict"),
    *("decoder", "encoder", "generator", "text_config", "text_encoder", "vision_config", "lm_head", "fusion_gate"),
]


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_name_that_means_something_else_is_refused(name, good, fuse_without_loading):
    with pytest.raises(ValueError, match=saying("name becomes the name of a module", f"got {name!r}", "Try")) as error:
        UltraFuserForCausalLM.from_specialists({"text": good, name: good})
    assert str(error.value) == str(pytest.raises(ValueError, config_with_names, ["text", name]).value)
    tip = re.search(r"Try '([^']*)'", str(error.value))[1]
    assert config_with_names(["text", tip]).specialist_names == ["text", tip]


def config_with_names(names):
    return UltraFuserConfig(specialist_names=names, specialists=two_configs())


def test_a_name_that_is_an_attribute_of_the_container_is_refused():
    taken = [name for name in dir(torch.nn.ModuleDict()) if re.fullmatch(r"[a-z]\w*", name)]
    assert len(taken) > 50
    for name in taken:
        with pytest.raises(ValueError, match="name becomes the name of a module"):
            config_with_names(["text", name])


@pytest.mark.parametrize("name", ["text", "code", "math", "Qwen2", "a", "med_2b"])
def test_an_ordinary_name_is_taken(name):
    assert config_with_names([name, "other"]).specialist_names[0] == name


def test_duplicate_names_are_refused():
    with pytest.raises(ValueError, match=saying("name of its own", "['text']", "more than once")):
        config_with_names(["text", "text"])


def test_names_and_configurations_of_different_number_are_refused():
    for names, configs in ((["text"], two_configs()), (["text", "code"], None), (None, two_configs())):
        numbers = saying("one name and one configuration", f"{len(names or [])} names", f"{len(configs or [])} conf")
        with pytest.raises(ValueError, match=numbers):
            UltraFuserConfig(specialist_names=names, specialists=configs)


def test_a_single_specialist_is_refused(good, fuse_without_loading):
    with pytest.raises(ValueError, match=saying("at least two specialists", "['text']", "its own class")):
        UltraFuserForCausalLM.from_specialists({"text": good})
    with pytest.raises(ValueError, match="at least two specialists"):
        UltraFuserForCausalLM.from_specialists({})


@pytest.mark.parametrize("kind", [list, str])
def test_specialists_without_names_are_refused(kind, good):
    with pytest.raises(TypeError, match=f"must map a name to each specialist, but got {kind.__name__}"):
        UltraFuserForCausalLM.from_specialists(kind([good, good]))


def test_a_configuration_without_specialists_builds_no_model():
    with pytest.raises(ValueError, match=saying("needs specialists", "from_specialists")):
        UltraFuserForCausalLM(UltraFuserConfig())


# ---------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"fusion": "weights"}, ("Unknown fusion 'weights'", "'logits', 'probabilities'")),
        ({"gate_temperature": 0}, ("must be a positive number", "it is 0.", "gate='uniform'")),
        ({"gate_temperature": -1.0}, ("must be a positive number", "-1.0")),
        ({"gate_temperature": float("nan")}, ("must be a positive number", "nan")),
        ({"gate_temperature": float("inf")}, ("must be a positive number", "inf")),
        ({"gate_temperature": "1"}, ("must be a positive number", "'1'")),
        ({"gate_temperature": True}, ("must be a positive number", "True")),
        ({"gate_hidden_size": 0}, ("must be a positive integer", "it is 0.", "512")),
        ({"gate_hidden_size": 2.5}, ("must be a positive integer", "2.5")),
        ({"gate_hidden_size": True}, ("must be a positive integer", "True")),
        ({"gate_hidden_size": 99999999999}, ("must be a positive integer", "at most 65,536", "99999999999")),
        ({"gate_temperature": 10**400}, ("must be a positive number", "1000000")),
        ({"gate_temperature": 1e-320}, ("must be a positive number", "1e-320")),
        ({"gate_switch_probability": 10**400}, ("at least 0 and below 1", "1000000")),
        ({"gate_switch_probability": float("nan")}, ("at least 0 and below 1", "nan")),
        ({"gate_switch_probability": True}, ("at least 0 and below 1", "True")),
    ],
    ids=str,
)
def test_an_unknown_choice_is_refused_before_a_folder_is_opened(choice, words):
    with pytest.raises(ValueError, match=saying(*words)):
        UltraFuserForCausalLM.from_specialists({"text": "/no/folder", "code": "/no/folder"}, **choice)
    with pytest.raises(ValueError, match=saying(*words)):
        UltraFuserConfig(specialist_names=["text", "code"], specialists=two_configs(), **choice)


@pytest.mark.parametrize("gate", ["softmax", None, 3], ids=str)
def test_an_unknown_gate_is_refused_before_a_folder_is_opened(gate):
    known = "'mlp', 'cross', 'evidence', 'linear', 'anchor', 'constant'"
    with pytest.raises(
        ValueError, match=saying("A gate is one of", known, f"But got {gate!r}", "Choose one of those")
    ):
        UltraFuserForCausalLM.from_specialists({"text": "/no/folder", "code": "/no/folder"}, gate=gate)
    with pytest.raises(ValueError, match=saying(f"Unknown gate {gate!r}", known)):
        UltraFuserConfig(specialist_names=["text", "code"], specialists=two_configs(), gate=gate)


def test_an_unknown_argument_is_refused(good, fuse_without_loading):
    with pytest.raises(TypeError, match="trust_remote_code"):
        fuse_without_loading(good, trust_remote_code=True)


@pytest.mark.parametrize("dtype", ["int8", "float13", torch.int64, 32])
def test_a_dtype_that_is_no_floating_point_type_is_refused(dtype, good, fuse_without_loading):
    with pytest.raises(ValueError, match=saying("floating point", repr(dtype))):
        fuse_without_loading(good, dtype=dtype)


@pytest.mark.parametrize("given", ["llama", 3])
def test_a_configuration_must_be_a_configuration(given):
    with pytest.raises(TypeError, match=saying("configuration object or a dict", type(given).__name__)):
        UltraFuserConfig(specialist_names=["text", "code"], specialists=[given, given])


def test_a_configuration_of_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=saying("transformers itself contains", "'novel'", "Upgrade transformers")):
        UltraFuserConfig(specialist_names=["text", "code"], specialists=[{"model_type": "novel"}] * 2)


# ---------------------------------------------------------------------------------- what cannot be read


def test_a_folder_that_does_not_exist_is_refused(fuse_without_loading, tmp_path):
    with pytest.raises(OSError, match=saying("'other' could not be read", "no_such", "Check the spelling")):
        fuse_without_loading(tmp_path / "no_such")


def test_a_folder_without_a_configuration_is_refused(fuse_without_loading, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=saying("'other'", "no config.json", "'notes.txt'", "save_pretrained")):
        fuse_without_loading(tmp_path)


def test_a_file_is_refused(good, fuse_without_loading):
    with pytest.raises(ValueError, match=saying("a folder or a Hub id", "'other' is the file", "model.safetensors")):
        fuse_without_loading(good / "model.safetensors")


def test_a_repository_that_is_not_in_the_cache_is_refused_offline(fuse_without_loading):
    with pytest.raises(
        OSError, match=saying("'other' could not be read", "'nobody/nothing'", "offline, pass a local")
    ):
        fuse_without_loading("nobody/nothing")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError, "gated repo"),
        (RepositoryNotFoundError, "not a valid model identifier"),
        (RevisionNotFoundError, "not a valid git identifier"),
    ],
)
def test_what_the_hub_denies_is_told_with_the_way_in(error, said, fuse_without_loading, monkeypatch):
    def deny(*args, **kwargs):
        raise error("denied", response=SimpleNamespace(headers={}, request=None, status_code=403))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", deny)
    told = saying("'other' could not be read", "'lab/secret'", "'v1'", "no token was given", "hf auth login", said)
    with pytest.raises(OSError, match=told):
        fuse_without_loading("lab/secret", revisions={"other": "v1"})
    with pytest.raises(OSError, match="a token was given") as told:
        fuse_without_loading("lab/secret", token="hf_quiet")
    assert "hf_quiet" not in str(told.value)


def test_revisions_of_unknown_specialists_are_refused(good, fuse_without_loading):
    with pytest.raises(ValueError, match=saying("`revisions` names ['math']", "['text', 'other']")):
        fuse_without_loading(good, revisions={"math": "main"})


def test_a_folder_without_safetensors_is_refused_by_name(good, tmp_path):
    save(specialist(layers=1, hidden_size=16), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=saying("'other'", "Only the safetensors format", "convert")):
        UltraFuserForCausalLM.from_specialists({"text": good, "other": tmp_path})


@pytest.mark.parametrize("given", [3, None, torch.nn.Linear(2, 2)], ids=["int", "None", "module"])
def test_a_specialist_that_is_no_model_is_refused(given, fuse_without_loading):
    named = saying("a Hub id, a local folder or a transformers model", "'other'", type(given).__name__, "PEFT")
    with pytest.raises(TypeError, match=named):
        fuse_without_loading(given)


# ---------------------------------------------------------------------------------- checkpoints


def other_config(folder, names):
    """The saved configuration with other specialists: those of these names, all alike."""
    config = UltraFuserConfig.from_pretrained(folder)
    specialists = [copy.deepcopy(config.specialists[0]) for _ in names]
    return UltraFuserConfig(specialist_names=names, specialists=specialists, gate=config.gate)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["text", "code"], ("holds 3 (['text', 'code', 'math'])", "names 2 (['text', 'code'])")),
        (["text", "code", "math", "law"], ("holds 3 (['text', 'code', 'math'])", "names 4")),
        (["text", "code", "law"], ("holds 3 (['text', 'code', 'math'])", "names 3 (['text', 'code', 'law'])")),
        (["a", "b"], ("holds 3 (['code', 'math', 'text'])", "names 2 (['a', 'b'])")),
    ],
    ids=["fewer", "more", "another", "none of them"],
)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_a_checkpoint_of_other_specialists_is_refused_in_one_sentence(auto_class, names, told, fused_folder, caplog):
    with pytest.raises(ValueError, match=saying("must hold the specialists", *told, "from_specialists")) as error:
        auto_class.from_pretrained(fused_folder, config=other_config(fused_folder, names))
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    ("key", "shape", "told"),
    [
        ("model.fusion_gate.bias", (2,), "`model.fusion_gate.bias` has shape (2,) there and (3,) here"),
        ("model.fusion_gate.weight", (2, 48), "`model.fusion_gate.weight` has shape (2, 48) there and (3, 48) here"),
        ("lm_head.weight", (99, 32), "`lm_head.weight` has shape (99, 32) there and (99, 48) here"),
    ],
)
def test_a_gate_or_head_for_another_number_of_specialists_is_refused(key, shape, told, fused_folder, tmp_path):
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text((fused_folder / file).read_text())
    state = load_file(fused_folder / "model.safetensors")
    save_file(state | {key: torch.zeros(shape)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=saying("must hold the specialists", "names 3", told)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_new_gate_on_old_specialists_is_no_mistake(fused_folder):
    config = UltraFuserConfig.from_pretrained(fused_folder, gate="mlp", gate_hidden_size=8)
    fused, info = UltraFuserForCausalLM.from_pretrained(fused_folder, config=config, output_loading_info=True)
    assert {".".join(key.split(".")[:2]) for key in info["missing_keys"]} == {"model.fusion_gate"}
    torch.testing.assert_close(fused.gate_weights(torch.arange(3, 9)[None]), torch.full((1, 6, 3), 1 / 3))


# ---------------------------------------------------------------------------------- what is asked of the model


def test_embeddings_as_input_are_refused(fused):
    for model in (fused, fused.model):
        with pytest.raises(ValueError, match=saying("reads token ids", "`inputs_embeds`", "`input_ids`")):
            model(inputs_embeds=torch.zeros(1, 2, 32))


def test_no_input_is_refused(fused):
    with pytest.raises(ValueError, match="`input_ids` is None"):
        fused()


def test_an_unknown_specialist_is_refused(fused):
    with pytest.raises(KeyError, match=saying("'law'", "['text', 'code', 'math']")):
        fused.specialist("law")
