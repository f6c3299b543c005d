"""What cannot be a specialist, or not beside the others, is refused with the rule and the way out."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPTJConfig,
    LlamaForCausalLM,
    MambaConfig,
    PhiConfig,
    ViTConfig,
    set_seed,
)

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.checkpoints import classifier, edit_config, encoder, encoder_decoder, headless, save, saying, vision
from tests.support.tiny import specialist, tokenizer
from tests.support.versions import TESTED


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


@pytest.fixture
def fuse_without_loading(good, monkeypatch):
    """Fuses a good specialist with another, and fails the test if a weight is read on the way."""

    def reached(*args, **kwargs):
        pytest.fail("weights were about to be loaded")

    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        monkeypatch.setattr(auto_class, "from_pretrained", reached)
    return lambda other, **choices: UltraFuserForCausalLM.from_specialists({"text": good, "other": other}, **choices)


# ---------------------------------------------------------------------------------- what is no specialist


def test_an_adapter_is_refused(fuse_without_loading, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=saying("whole models", "'other'", "only an adapter", "merge_and_unload")):
        fuse_without_loading(tmp_path)


@pytest.mark.parametrize("build", [encoder, vision, encoder_decoder, headless, classifier])
def test_a_folder_of_another_kind_of_model_is_refused(build, fuse_without_loading, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    told = saying("a decoder with a language-model head", "'other'", model.config.model_type, type(model).__name__)
    with pytest.raises(ValueError, match=told):
        fuse_without_loading(tmp_path)


@pytest.mark.parametrize("build", [encoder, vision, encoder_decoder, headless, classifier])
def test_a_model_of_another_kind_in_memory_is_refused(build, good):
    with pytest.raises(ValueError, match=saying("A specialist", " must ", "'other'")):
        UltraFuserForCausalLM.from_specialists({"text": good, "other": build()})


def test_a_vision_configuration_alone_is_refused(fuse_without_loading, tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=saying("a causal language model", "'other' is a 'vit' model")):
        fuse_without_loading(tmp_path)


def test_a_model_that_keeps_another_state_than_keys_and_values_is_refused(fuse_without_loading, tmp_path):
    config = MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for other in (tmp_path, model):
        with pytest.raises(
            ValueError, match=saying("key-value cache", "'other' is a 'mamba' model") if TESTED else "Mamba|mamba"
        ):
            fuse_without_loading(other)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "novel"}, ("'novel'", "is unknown", "upgrade transformers")),
        ({"model_type": "novel", "auto_map": {"AutoConfig": "x.Y"}}, ("'novel'", "remote code", "never run here")),
        ({"model_type": None}, ("of type None", "is unknown")),
    ],
    ids=["unknown", "remote code", "none"],
)
def test_an_architecture_that_transformers_does_not_contain_is_refused(fields, words, fuse_without_loading, tmp_path):
    edit_config(save(specialist(layers=1, hidden_size=16), tmp_path), **fields)
    with pytest.raises(ValueError, match=saying("transformers itself contains", "'other'", *words)):
        fuse_without_loading(tmp_path)


def test_a_quantised_folder_is_refused(fuse_without_loading, tmp_path):
    save(specialist(layers=1, hidden_size=16), tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match=saying("plain weights", "'other'", "quantised", "quantise the result")):
        fuse_without_loading(tmp_path)


def test_a_quantised_model_in_memory_is_refused(fuse_without_loading):
    model = specialist(layers=1, hidden_size=16)
    model.hf_quantizer = object()
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter((100 * weight).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=saying("plain weights", "'other'", "quantised model in memory")):
        fuse_without_loading(model)


def test_a_fused_model_is_no_specialist(fused_folder, fuse_without_loading):
    for other in (fused_folder, three()):
        with pytest.raises(ValueError, match=saying("'other' is itself a fused model", "['text', 'code', 'math']")):
            fuse_without_loading(other)


# ---------------------------------------------------------------------------------- what does not match


def test_a_different_tokenizer_is_refused(fuse_without_loading, tmp_path):
    save(specialist(layers=1, hidden_size=16), tmp_path, tokenizer(swap="ab"))
    told = saying("one tokenizer", "'other'", "different", "'text'", "2 ids differ", "first is 69, 'a' against 'b'")
    with pytest.raises(ValueError, match=told):
        fuse_without_loading(tmp_path)


def test_a_tokenizer_that_lacks_tokens_is_refused(fuse_without_loading, tmp_path):
    save(specialist(layers=1, hidden_size=16), tmp_path, tokenizer(90))
    told = saying("'other'", "different", "9 ids differ", "first is 90", "against None")
    with pytest.raises(ValueError, match=told):
        fuse_without_loading(tmp_path)


def test_a_tokenizer_that_splits_differently_is_refused(fuse_without_loading, tmp_path):
    words = tokenizer()
    state = json.loads(words.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Lowercase"}
    words._tokenizer = type(words.backend_tokenizer).from_str(json.dumps(state))
    save(specialist(layers=1, hidden_size=16), tmp_path, words)
    told = saying("one tokenizer", "'other' splits text differently from 'text'", "vocabularies are equal")
    with pytest.raises(ValueError, match=told):
        fuse_without_loading(tmp_path)


def test_unequal_dtypes_are_refused_unless_one_is_chosen(good, tmp_path):
    save(specialist(layers=1, hidden_size=16).bfloat16(), tmp_path)
    both = {"text": good, "code": tmp_path}
    told = saying("one dtype", "'text': torch.float32", "'code': torch.bfloat16", "dtype=torch.bfloat16")
    with pytest.raises(ValueError, match=told):
        UltraFuserForCausalLM.from_specialists(both)
    fused = UltraFuserForCausalLM.from_specialists(both, dtype=torch.bfloat16)
    assert {p.dtype for n, p in fused.named_parameters() if "fusion_gate" not in n} == {torch.bfloat16}


def test_unequal_dtypes_are_refused_before_loading(fuse_without_loading, tmp_path):
    save(specialist(layers=1, hidden_size=16).bfloat16(), tmp_path)
    with pytest.raises(ValueError, match="one dtype"):
        fuse_without_loading(tmp_path)


def test_unequal_soft_caps_are_refused_for_logits_alone(good, tmp_path):
    save(specialist("gemma2", layers=1, hidden_size=16), tmp_path)
    both = {"text": good, "other": tmp_path}
    told = saying("soft cap is not linear", "'text': None", "'other': 30.0", "fusion='probabilities'")
    with pytest.raises(ValueError, match=told):
        UltraFuserForCausalLM.from_specialists(both)
    assert UltraFuserForCausalLM.from_specialists(both, fusion="probabilities").config.fusion == "probabilities"


def test_unequal_soft_caps_are_refused_before_loading(fuse_without_loading, tmp_path):
    save(specialist("gemma2", layers=1, hidden_size=16), tmp_path)
    with pytest.raises(ValueError, match="soft cap"):
        fuse_without_loading(tmp_path)


# ---------------------------------------------------------------------------------- what only shows when loaded


@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
        GPTJConfig(vocab_size=99, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, eos_token_id=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_head_with_a_bias_is_refused_when_loaded(config, good, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    save(model, tmp_path)
    for other in (tmp_path, model):
        with pytest.raises(ValueError, match=saying("head must have no bias", "'other'", type(model).__name__)):
            UltraFuserForCausalLM.from_specialists({"text": good, "other": other})


class Crooked(LlamaForCausalLM):
    """Does something to its logits that its configuration does not tell."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + 0.1 * outputs.logits.tanh()
        return outputs


class Hindsight(LlamaForCausalLM):
    """Lets a later token change an earlier prediction."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + outputs.logits.mean(1, keepdim=True)
        return outputs


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Crooked, ("'other' (Crooked)", "between its backbone and its logits", "logits differ by up to")),
        (Hindsight, ("must be a decoder", "'other'", "(Hindsight)", "a later token changes")),
    ],
    ids=["crooked", "hindsight"],
)
def test_a_model_that_is_more_than_a_backbone_and_a_head_is_refused_by_the_probe(kind, words, good):
    straight = specialist(layers=1, hidden_size=16)
    model = kind(straight.config).eval()
    model.load_state_dict(straight.state_dict())
    with pytest.raises(ValueError, match=saying(*words)):
        UltraFuserForCausalLM.from_specialists({"text": good, "other": model})
    UltraFuserForCausalLM.from_specialists({"text": good, "other": straight})
