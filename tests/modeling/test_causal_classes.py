"""What families keep on their causal classes has its effect in a fused model, or is refused by name."""

import json
from functools import wraps

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.models.bloom.modeling_bloom import BloomForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM
from modeling_ultrafuser.causal_ultrafuser import HANDLED, PREPARED, check_causal_class, overridden
from modeling_ultrafuser.compat_ultrafuser import CACHE
from modeling_ultrafuser.plan_base_ultrafuser import BLOCKS
from modeling_ultrafuser.serving_ultrafuser import check_servable
from tests.support.tiny import VOCAB, specialist, stir_gate, tokenizer
from tests.support.versions import TESTED
from ultrafuser.check.checks import judge


SWITCH, STEPS = 24, 12


def fuse(parts, **choices):
    fused = UltraFuserForCausalLM.from_specialists(parts, gate_hidden_size=16, **choices)
    stir_gate(fused)
    return unending(fused)


def unending(model):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(length=18, batch=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def generate(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "do_sample": False} | options
    return model.generate(ids, **options)


# ---------------------------------------------------------------------------------------------- all classes


# families that are refused, so that what their causal classes have of their own is not lost in silence
REFUSED = {
    "cpmant": "reads the whole text beside its cache at every step",
    "ctrl": "its head has a bias",
    "roc_bert": "its head has a bias",
    "mvp": "an encoder-decoder's decoder has no backbone of its own",
    "pegasus": "an encoder-decoder's decoder has no backbone of its own",
    "prophetnet": "an encoder-decoder's decoder has no backbone of its own",
    "whisper": "an encoder-decoder's decoder has no backbone of its own",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "four codebooks and a head for each"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "openai-gpt", "xlm", "xlnet"), "no key-value cache"),
    **dict.fromkeys(("reformer", "rwkv", "xlstm"), "no key-value cache"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "reads another model's hidden states"),
}


# what has parts: the text part alone is fused, under a type of its own
COMPOSITES = (
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "got_ocr2",
    "moss_transcribe_diarize",
    "mllama",
    "qwen4_exp",
)


FAMILIES = [c for c in MODEL_FOR_CAUSAL_LM_MAPPING if c in MODEL_MAPPING and c.__module__.startswith("transformers.")]


def one(found):
    return found[0] if isinstance(found, tuple | list) else found


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.model_type)
def test_everything_that_a_causal_class_overrides_is_handled_or_refused(config):
    causal, backbone = one(MODEL_FOR_CAUSAL_LM_MAPPING[config]), one(MODEL_MAPPING[config])
    unknown = overridden(causal, backbone) - set(HANDLED)
    if config.model_type in PREPARED:
        assert "prepare_inputs_for_generation" in unknown, "the table names a family that does not need it"
        unknown.discard("prepare_inputs_for_generation")
    if config.model_type in COMPOSITES:
        return
    if unknown and config.model_type not in REFUSED and not TESTED:
        # what another version adds is refused until somebody has looked at it
        with pytest.raises(ValueError, match=f"{causal.__name__} of 'text' has .* of its own"):
            check_causal_class("text", config(), backbone)
        return
    assert not unknown or config.model_type in REFUSED, f"{causal.__name__} has {sorted(unknown)} of its own"


@pytest.mark.e2e
def test_nothing_in_the_tables_is_without_use():
    families = {c.model_type for c in MODEL_FOR_CAUSAL_LM_MAPPING}
    pairs = [(one(MODEL_FOR_CAUSAL_LM_MAPPING[c]), one(MODEL_MAPPING[c])) for c in FAMILIES]
    used = set().union(*(overridden(*pair) for pair in pairs))
    assert set(HANDLED) <= used
    assert {*PREPARED, *REFUSED, *COMPOSITES} <= families or not TESTED


def test_a_causal_class_with_another_method_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", lambda self, ids, **_: {}, raising=False)
    assert overridden(LlamaForCausalLM, LlamaModel) - set(HANDLED) == {"prepare_inputs_for_generation"}
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM of 'text' has \['prepare_inputs_for_generation'\] of its own"
    ):
        fuse({"text": specialist(), "code": specialist()})


# ---------------------------------------------------------------------------------------------- masks


HYBRIDS = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "zaya": {"head_dim": 8},
    "doge": {"keep_window_size": 64},
    "nemotron_h": {},
}


# where Bloom prepares its inputs itself it is refused
needs_masks_of_bloom = pytest.mark.skipif(
    not hasattr(BloomForCausalLM, "create_masks_for_generate"), reason="this version's Bloom makes no masks of its own"
)


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("family", [pytest.param("bloom", marks=needs_masks_of_bloom), "zaya", "doge", "nemotron_h"])
def test_masks_of_a_static_cache_are_made_as_the_causal_class_makes_them(family):
    fused = fuse({"text": specialist(family, **HYBRIDS[family]), "code": specialist()})
    ids, mask = prompt(9, batch=2), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    for options in ({}, {"num_beams": 2}):
        dynamic = generate(fused, ids, attention_mask=mask, max_new_tokens=5, **options)
        static = generate(fused, ids, attention_mask=mask, max_new_tokens=5, cache_implementation="static", **options)
        assert torch.equal(static, dynamic)


@needs_masks_of_bloom
def test_a_static_method_and_an_ordinary_one_make_masks_alike(monkeypatch):
    made = []
    its = BloomForCausalLM.create_masks_for_generate
    monkeypatch.setattr(
        BloomForCausalLM,
        "create_masks_for_generate",
        staticmethod(lambda *a, **k: made.append(a) or its(None, *a, **k)),
    )
    fused = fuse({"text": specialist("bloom", **HYBRIDS["bloom"]), "code": specialist()})
    dynamic = generate(fused, prompt(9))
    assert torch.equal(generate(fused, prompt(9), cache_implementation="static"), dynamic)
    assert made


def test_drafts_are_refused_where_only_the_causal_class_says_that_it_cannot_go_back():
    fused = fuse({"text": specialist("zaya", head_dim=8), "code": specialist()})
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(fused, prompt(4).repeat(1, 3), prompt_lookup_num_tokens=3)


# ---------------------------------------------------------------------------------------------- saving and the probe


@pytest.mark.e2e
def test_layers_of_a_type_that_one_family_has_are_saved(tmp_path):
    fused = fuse({"text": specialist(), "code": specialist("nemotron_h")})
    assert {"moe", "mlp"} <= set(fused.config.layer_types)
    fused.save_pretrained(tmp_path)
    again = UltraFuserForCausalLM.from_pretrained(tmp_path)
    assert again.config.layer_types == fused.config.layer_types
    assert torch.equal(again(prompt()).logits, fused(prompt()).logits)


def mini(**fields):
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    return specialist("minicpm3", num_key_value_heads=4, **{**sizes, "head_dim": 4} | fields)


@pytest.mark.grid
@pytest.mark.parametrize("base", [16, 32, 128])
def test_a_scale_that_is_computed_is_folded_into_the_head(base, tmp_path):
    alone = mini(dim_model_base=base)
    assert alone.config.logits_scaling == 32 / base
    fused = UltraFuserForCausalLM.from_specialists({"text": alone, "code": specialist()}, gate="uniform")
    other = fused.specialist("code")(prompt()).logits
    torch.testing.assert_close(fused(prompt()).logits, (alone(prompt()).logits + other) / 2, rtol=1e-4, atol=1e-5)
    fused.specialist("text").save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(back(prompt()).logits, alone(prompt()).logits, rtol=1e-4, atol=1e-5)


def test_a_configuration_that_cannot_be_read_back_is_refused_before_weights_are_read(monkeypatch):
    read = PreTrainedConfig.from_pretrained.__func__

    def forgetful(cls, *args, **kwargs):
        config = read(cls, *args, **kwargs)
        if config.model_type == "qwen2":
            config.rms_norm_eps = 0.5
        return config

    parts = {"text": specialist(), "code": specialist("qwen2")}
    monkeypatch.setattr(PreTrainedConfig, "from_pretrained", classmethod(forgetful))
    with pytest.raises(ValueError, match=r"\['rms_norm_eps'\] of 'code' \('qwen2'\) are read back as something else"):
        UltraFuserForCausalLM.from_specialists(parts)


@pytest.mark.parametrize("fault", ["fails", "differs"])
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_a_step_that_only_the_fused_model_gets_wrong_is_refused_by_name(fault, kind, monkeypatch):
    forward = LlamaModel.forward

    @wraps(forward)
    def odd(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        shared = getattr(kwargs.get(CACHE), "cache", None)
        if type(shared).__name__ == kind:
            if fault == "fails":
                raise KeyError("layer_7")
            output.last_hidden_state = -output.last_hidden_state
        return output

    parts = {"text": specialist("qwen2"), "code": specialist("llama")}
    monkeypatch.setattr(LlamaModel, "forward", odd)
    with pytest.raises(ValueError, match=rf"'code' \('?[lL]lama\w*'?\).*{kind}") as refusal:
        UltraFuserForCausalLM.from_specialists(parts)
    assert ("layer_7" in str(refusal.value)) == (fault == "fails")


def test_a_head_that_a_family_keeps_in_float32_is_not_rounded():
    rounded = torch.bfloat16

    class KeepsItsHead(LlamaForCausalLM):
        _keep_in_fp32_modules_strict = ["lm_head"]

    from modeling_ultrafuser import causal_ultrafuser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_ultrafuser, "causal_class", lambda config: KeepsItsHead)
        with pytest.raises(
            ValueError, match=r"KeepsItsHead of 'text' keeps \['lm_head'\] in float32.*dtype='float32'"
        ):
            fuse({"text": specialist(), "code": specialist()}, dtype=rounded)
        fuse({"text": specialist(), "code": specialist()}, dtype="float32")


# ---------------------------------------------------------------------------------------------- check says the same


ODD = {
    "cpmant": {"num_hidden_layers": 2, "dim_head": 8, "dim_ff": 64, "prompt_length": 4},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "mamba": {"state_size": 4},
    "bert": {"is_decoder": True},
}


@pytest.mark.grid
@pytest.mark.parametrize("family", ODD)
def test_a_family_that_fusing_refuses_is_refused_by_check_with_the_same_sentence(family, tmp_path):
    model = specialist(family, **ODD[family])
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="[Ss]pecialist") as refusal:
        UltraFuserForCausalLM.from_specialists({"text": folder, "code": folder})
    blocks = [f.text for f in judge({"text": (folder, None), "code": (folder, None)}).findings if f.status == BLOCKS]
    assert any(str(refusal.value).startswith(text.removesuffix(".")) for text in blocks), blocks


def test_a_scale_that_is_computed_passes_the_check(tmp_path):
    mini(dim_model_base=16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    found = judge({"text": (str(tmp_path), None), "code": (str(tmp_path), None)})
    assert not [f for f in found.findings if f.status == BLOCKS]
    assert UltraFuserConfig(specialist_names=["a", "b"], specialists=[mini().config] * 2).a.logits_scaling == 1.0


def test_a_family_whose_layers_have_heads_of_two_widths_is_fused_and_saved(tmp_path):
    types = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
    wide = specialist("gemma4_text", layer_types=types, head_dim=8, global_head_dim=16, sliding_window=6, **sizes)
    fused = fuse({"text": wide, "code": specialist()})
    assert not hasattr(fused.config, "head_dim")
    expected = generate(fused, prompt(), use_cache=False)
    assert torch.equal(generate(fused, prompt()), expected)
    assert torch.equal(generate(fused, prompt(), cache_implementation="static"), expected)
    fused.save_pretrained(tmp_path)
    assert torch.equal(generate(unending(UltraFuserForCausalLM.from_pretrained(tmp_path)), prompt()), expected)
    with pytest.raises(ValueError, match="one `head_dim` for all specialists"):
        check_servable(fused.config)


UNBUILDABLE = {
    "says neither how wide nor how deep": ({"model_type": "blt"}, "does not say ['hidden_size', 'num_hidden_layers']"),
    "no number of experts": ({"model_type": "dots1", "hidden_size": 32}, "cannot be read: TypeError"),
    "no head width": ({"model_type": "hunyuan_v1_dense", "hidden_size": 32}, "cannot be read: TypeError"),
}


@pytest.mark.parametrize("case", UNBUILDABLE)
def test_a_configuration_from_which_no_model_follows_ends_the_check_in_a_sentence(case, tmp_path):
    written, words = UNBUILDABLE[case]
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = judge({"text": (str(tmp_path), None), "code": (str(tmp_path), None)})
    assert any(words in f.text for f in found.findings if f.status == BLOCKS), found.findings


def test_a_family_without_a_padding_id_is_read():
    with pytest.raises(ValueError, match="CodeGen.*head must have no bias"):
        fuse({"text": specialist("codegen", n_embd=32, n_head=4, n_layer=1, rotary_dim=4), "code": specialist()})
