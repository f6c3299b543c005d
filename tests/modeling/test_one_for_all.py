"""What other code asks of "the" embedding, attention or last state is so for every specialist, or refused."""

import os

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.checkpoints import saying
from tests.support.conversations import sft_trainer
from tests.support.mixes import prompt
from tests.support.tiny import specialist, stir_gate, tokenizer
from tests.support.versions import needs_peft_in_the_library


IDS = torch.tensor([[5, 9, 7, 11]])


NAMES = ("text", "code", "math")


def pair(**other):
    """Two specialists; `other` is what the second has otherwise."""
    model = UltraFuserForCausalLM.from_specialists(
        {"text": specialist("llama", layers=1), "code": specialist("llama", layers=2, **other)}
    )
    stir_gate(model)
    return model


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)


def embedded(model, train=True):
    """What every specialist's embedding gives out in one pass, by name."""
    seen = {}
    for name, s in model.model.specialists.items():
        s.get_input_embeddings().register_forward_hook(lambda *call, name=name: seen.update({name: call[-1].detach()}))
    with torch.no_grad():
        model.train(train)(IDS)
    return seen


# ---------------------------------------------------------------------------------------------------- the embedding


def test_training_noise_reaches_every_specialist_and_ends(fused):
    plain = embedded(fused)
    handle = activate_neftune(fused, 5.0)
    assert all(not torch.equal(plain[n], noisy) for n, noisy in embedded(fused).items())
    assert all(torch.equal(plain[n], quiet) for n, quiet in embedded(fused, train=False).items())
    deactivate_neftune(fused, handle)
    assert all(torch.equal(plain[n], quiet) for n, quiet in embedded(fused).items())
    assert not any(hasattr(s.get_input_embeddings(), "neftune_noise_alpha") for s in fused.model.specialists.values())


def test_training_noise_of_trl_reaches_every_specialist(fused, tmp_path):
    trainer = sft_trainer(fused, tmp_path, neftune_noise_alpha=5.0, max_steps=1)
    alphas = []

    def look(*_):
        alphas.append([s.get_input_embeddings().neftune_noise_alpha for s in fused.model.specialists.values()])

    fused.register_forward_pre_hook(look)
    trainer.train()
    assert alphas[0] == [5.0] * 3


def test_gradients_of_inputs_are_asked_of_every_specialist(fused):
    fused.requires_grad_(False).enable_input_require_grads()
    out = [s.get_input_embeddings()(IDS) for s in fused.model.specialists.values()]
    assert all(o.requires_grad for o in out)
    fused.disable_input_require_grads()
    assert not any(s.get_input_embeddings()(IDS).requires_grad for s in fused.model.specialists.values())


@pytest.mark.grid
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_gradients_are_the_same_with_checkpointing(adapters, reentrant, fused):
    ids = torch.arange(3, 19)[None]
    model = get_peft_model(fused, lora(init_lora_weights=False)) if adapters else fused

    def gradients():
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == plain.keys() == checkpointed.keys()
    trained = "lora_A" if adapters else "embed_tokens"
    assert all(any(f"specialists.{s}." in n and trained in n and g.any() for n, g in plain.items()) for s in NAMES)
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, atol=1e-6), name


def test_the_one_embedding_freezes_all_and_tells_the_number_of_rows(fused):
    embedding = fused.get_input_embeddings()
    assert embedding.weight.shape == (embedding.num_embeddings, embedding.embedding_dim) == (99, 32 + 32 + 48)
    assert embedding.weight.device == fused.device
    embedding.requires_grad_(False)
    frozen = {n for n, p in fused.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.specialists.{n}.embed_tokens.weight" for n in NAMES}


@pytest.mark.parametrize(
    "use",
    [
        lambda e: e.weight.data[-1].zero_(),
        lambda e: nn.init.normal_(e.weight),
        lambda e: e.weight.requires_grad_(False),
        lambda e: e.weight.mean(),
        lambda e: e.weight.copy_(torch.zeros(99, 32)),
        lambda e: setattr(e.weight, "data", torch.zeros(99, 32)),
    ],
)
def test_one_weight_is_neither_read_nor_written(use, fused):
    with pytest.raises(ValueError, match="embedding of its own.*specialists\\[name\\]"):
        use(fused.get_input_embeddings())


def test_no_vector_stands_for_a_token(fused):
    with pytest.raises(ValueError, match="embed the same token differently"):
        fused.get_input_embeddings()(IDS)


def test_embeddings_are_set_for_all_or_not_at_all(fused):
    new = {n: nn.Embedding(99, e.embedding_dim) for n, e in fused.get_input_embeddings().items()}
    fused.set_input_embeddings(nn.ModuleDict(new))
    assert [s.get_input_embeddings() is new[n] for n, s in fused.model.specialists.items()] == [True] * 3
    for value in (nn.Embedding(99, 32), nn.ModuleDict({"text": nn.Embedding(99, 32)})):
        with pytest.raises(ValueError, match=saying("takes one for each of ['text', 'code', 'math']", "by name")):
            fused.set_input_embeddings(value)


@pytest.mark.parametrize("given", [[5, 6], {"embed_tokens": [5, 6]}])
def test_tokens_are_trained_in_every_specialist(given, fused):
    model = get_peft_model(fused, lora(trainable_token_indices=given))
    trained = [n.split("specialists.")[1].split(".")[0] for n, p in model.named_parameters() if "token" in n]
    assert list(dict.fromkeys(trained)) == ["text", "code", "math"]


@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
)
def test_embeddings_of_other_names_are_not_left_out_in_silence(settings):
    other = specialist("gpt_neox", layers=1)
    fused = UltraFuserForCausalLM.from_specialists({"text": specialist("llama", layers=1), "code": other})
    with pytest.raises(ValueError, match=saying("reaches those of ['text'] alone", "embed_in", "name all")):
        get_peft_model(fused, lora(**settings))


@pytest.fixture
def resized(fused, tmp_path):
    """A folder's model with two more tokens."""
    fused.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    return model


def test_an_adapter_after_a_resize_is_refused_before_it_is_trained(resized):
    rule = saying("resized since", "new rows of one specialist", "Save the resized model", "'embed_tokens', 'lm_head'")
    with pytest.raises(ValueError, match=rule):
        get_peft_model(resized, lora())


def test_embeddings_trained_as_a_part_of_the_adapter_come_back(resized, tmp_path):
    settings = lora(modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(resized, settings).eval()
    for name, p in model.named_parameters():
        if p.requires_grad and "modules_to_save" in name:
            p.data += torch.randn_like(p)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(101)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 99, 7, 100]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_ways_out_of_a_resize_work(resized, tmp_path):
    resized.save_pretrained(tmp_path / "wide")
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide")  # noqa: E731
    model = get_peft_model(load(), lora(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 99, 7, 100]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_saving_the_embedding_beside_an_adapter_is_refused(fused, tmp_path):
    model = get_peft_model(fused, lora())
    with pytest.raises(ValueError, match=saying("leave out those of ['text', 'code', 'math']", "modules_to_save=")):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    model.save_pretrained(tmp_path, save_embedding_layers=False)


# -------------------------------------------------------------------------------------------------- adapters' names


def adapter_file(folder, name):
    return load_file(os.path.join(folder, name, "adapter_model.safetensors"))


@pytest.mark.grid
@pytest.mark.parametrize("name", ["text", "code", "model", "layers", "specialists", "mlp", "weight", "0"])
def test_adapters_called_as_a_part_of_the_model_are_refused_beside_others(name):
    model = get_peft_model(pair(), lora(), adapter_name="mine")
    with pytest.raises(ValueError, match=saying("must not be called as a part", f"['{name}']", "Choose other names")):
        model.add_adapter(name, lora())
    assert list(model.peft_config) == ["mine"]
    model.add_adapter("other", lora())


def test_an_adapter_called_as_a_specialist_is_refused_when_another_comes():
    model = get_peft_model(pair(), lora(), adapter_name="text")
    with pytest.raises(ValueError, match=saying("must not be called as a part", "['text']")):
        model.add_adapter("mine", lora())


@needs_peft_in_the_library
def test_the_librarys_own_adapters_are_refused_by_the_same_names():
    model = pair()
    model.add_adapter(lora(), "mine")
    with pytest.raises(ValueError, match=saying("must not be called as a part", "['code']")):
        model.add_adapter(lora(), "code")


def test_adapters_side_by_side_are_saved_whole(tmp_path):
    model = get_peft_model(pair(), lora(init_lora_weights=False), adapter_name="default")
    model.add_adapter("gate", lora(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert len(adapter_file(tmp_path, "gate")) == len(adapter_file(tmp_path, ".")) == 6


# --------------------------------------------------------------------------------------------- names of specialists


@pytest.mark.parametrize("name", ["temperature", "top_k", "guidance_scale", "max_new_tokens", "stop_strings"])
def test_a_name_that_generation_settings_have_is_refused(name):
    assert name in GenerationConfig().to_dict()
    with pytest.raises(ValueError, match=saying(f"got {name!r}", f"Try 'model_{name}'")):
        UltraFuserForCausalLM.from_specialists({"text": specialist("llama"), name: specialist("llama")})


@pytest.mark.grid
@pytest.mark.parametrize(
    "name", ["layers", "q_proj", "mlp", "embed_tokens", "rope_parameters", "default", "lora_math"]
)
def test_a_name_that_other_code_would_misread_is_refused_when_fusing(name):
    with pytest.raises(ValueError, match=saying(f"got {name!r}", "Try 'model_")) as error:
        UltraFuserForCausalLM.from_specialists({"text": specialist("llama"), name: specialist("llama")})
    usable = str(error.value).split("Try '")[1].split("'")[0]
    UltraFuserForCausalLM.from_specialists({"text": specialist("llama"), usable: specialist("llama")})


def test_a_prefix_of_peft_in_a_name_trains_and_merges_nothing_else_of_that_specialist():
    assert PEFT_TYPE_TO_PREFIX_MAPPING["IA3"] == "ia3_"
    parts = {"text": specialist("llama", layers=1), "ia3_math": specialist("llama", layers=1)}
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = get_peft_model(UltraFuserForCausalLM.from_specialists(parts), config).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name.partition(".k_proj.")[2] for name in trained] == ["ia3_l.default"] * len(parts)
    for parameter in trained.values():
        parameter.data += 1
    with torch.no_grad():
        ids = prompt()
        expected = model(ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected)
    assert not any("ia3_l" in name for name, _ in merged.named_parameters())


# -------------------------------------------------------------------------------------------------------- attention


EAGER = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}


def test_the_configuration_tells_how_all_specialists_attend():
    both = {name: specialist("gemma2", layers=1, **EAGER) for name in ("a", "b")}
    model = UltraFuserForCausalLM.from_specialists(both)
    assert model.config._attn_implementation == both["a"].config._attn_implementation
    alone = pair()
    assert alone.config._attn_implementation == "sdpa"
    alone.set_attn_implementation({"text": "eager"})
    assert [c._attn_implementation for c in (alone.config, *alone.config.specialists)] == ["eager", "eager", "sdpa"]
    alone.set_attn_implementation("sdpa")
    assert [c._attn_implementation for c in (alone.config, *alone.config.specialists)] == ["sdpa"] * 3


def test_a_refused_attention_leaves_the_configuration_true():
    model = pair()
    with pytest.raises(ValueError, match="not supported"):
        model.set_attn_implementation("no such")
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_of_specialists_that_attend_differently_is_refused():
    model = pair()
    model.set_attn_implementation({"text": "eager"})
    with pytest.raises(ValueError, match=saying("one paged attention", "'text': 'eager'", "'code': 'sdpa'")):
        model.generate_batch([[5, 6]], generation_config=GenerationConfig(max_new_tokens=2))


def test_attention_comes_back_with_a_folder(tmp_path):
    pair().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert [c._attn_implementation for c in (model.config, *model.config.specialists)] == ["eager"] * 3


# ------------------------------------------------------------------------------------------- last state, and a score


@pytest.fixture
def folder(fused, tmp_path):
    """A saved fused model and its tokenizer."""
    fused.config.pad_token_id = 0
    fused.save_pretrained(tmp_path / "fused")
    tokenizer().save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"
