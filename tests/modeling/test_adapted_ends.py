"""Adapters on the token embedding and on the head of one base: the head stays one wide linear layer."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.modeling.test_adapters import close
from tests.support.adapted import BASES, check_where_nothing_is_installed, make, pair
from tests.support.fusions import MIXTURES
from tests.support.mixes import prompt
from tests.support.tiny import GATE_WORDS
from ultrafuser.build.specialist_edits import remove_specialist


pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"), ends=True)


@pytest.fixture
def models(sources):
    return pair(sources)


@pytest.mark.grid
@pytest.mark.parametrize("family", BASES)
@torch.no_grad()
def test_every_specialist_says_what_peft_says_of_its_adapter(family, tmp_path):
    sources = make(tmp_path, family, ends=True)
    fused, ids = UltraFuserForCausalLM.from_specialists(sources), prompt()
    for name, folder in sources.items():
        expected = AutoPeftModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
        close(fused.specialist(name)(ids).logits, expected)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("family", BASES)
def test_a_fused_model_says_what_it_says_of_merged_specialists(family, fusion, tmp_path):
    adapted, merged = pair(make(tmp_path, family, ends=True), fusion=fusion, dtype=torch.float64)
    ids, found = prompt(), []
    for model in (adapted, merged):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        gate = [p.grad for p in model.model.fusion_gate.parameters()]
        found.append([outputs.logits, outputs.gate_weights, outputs.loss, *gate])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("gate", GATE_WORDS)
def test_every_gate_gives_the_tokens_of_merged_specialists(gate, fusion, sources):
    batch = {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())}
    batch["attention_mask"][1, :4] = 0
    texts = [m.generate(**batch, max_new_tokens=6, do_sample=False) for m in pair(sources, gate=gate, fusion=fusion)]
    assert torch.equal(*texts)


@torch.no_grad()
def test_the_head_has_a_column_for_each_rank_of_each_specialist_and_equals_the_loop(sources):
    fused, ids = pair(sources, gate="mlp")[0], prompt()
    assert fused.config.adapters | {"target_modules": []} == {
        "rank": 6,
        "target_modules": [],
        "embedding_rank": 3,
        "head_rank": 5,
    }
    assert fused.config.hidden_size == 32 + 3 * 5
    assert fused.lm_head.weight.shape == (99, 32 + 3 * 5)
    outputs, expected = fused(ids), 0
    base, a = fused.lm_head.weight[:, :32], fused.model.specialists["base"].adapted_head.lora_A
    for k, name in enumerate(fused.config.specialist_names):
        states = fused.specialist(name).model(ids).last_hidden_state
        own = F.linear(states, base) + states @ a[k].T @ fused.lm_head.weight[:, 32 + 5 * k : 37 + 5 * k].T
        expected = expected + outputs.gate_weights[..., k, None] * own
    close(outputs.logits, expected)


@torch.no_grad()
def test_a_loaded_model_is_the_saved_one_bit_by_bit_and_older_code_would_refuse_it(models, tmp_path):
    fused, ids = models[0], prompt()
    fused.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(ids).logits, fused(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2


def test_adapters_on_linear_layers_alone_are_saved_in_format_1(tmp_path):
    UltraFuserForCausalLM.from_specialists(make(tmp_path)).save_pretrained(tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["format_version"] == 1
    assert set(config["adapters"]) == {"rank", "target_modules"}


@torch.no_grad()
def test_a_saved_folder_is_the_same_where_neither_our_packages_nor_peft_are(models, tmp_path):
    check_where_nothing_is_installed(models[0], prompt(), tmp_path)


@torch.no_grad()
def test_without_one_of_them_the_others_keep_embedding_head_and_shares(sources):
    fused, ids = pair(sources, gate="mlp")[0], prompt()
    less = remove_specialist(fused, "code")
    assert less.config.hidden_size == 32 + 2 * 5
    for name in ("text", "math"):
        assert torch.equal(less.specialist(name)(ids).logits, fused.specialist(name)(ids).logits)
    before = fused(ids).gate_weights[..., [0, 2]]
    close(less(ids).gate_weights, before / before.sum(-1, keepdim=True))


def test_more_rows_of_the_vocabulary_are_refused_with_the_ways_out(models):
    with pytest.raises(ValueError, match="token embedding of .* has adapters.*Resize the base"):
        models[0].resize_token_embeddings(103)


def test_tables_of_the_base_in_an_adapters_file_are_refused_with_the_setting_that_leaves_them_out(tmp_path):
    sources = make(tmp_path)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj", "lm_head"])
    )
    adapted.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="lm_head.base_layer.weight.*save_embedding_layers=False"):
        UltraFuserForCausalLM.from_specialists(sources)


def test_an_adapter_on_a_scaled_embedding_is_refused(tmp_path):
    sources = make(tmp_path, "gemma2")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    adapted.save_pretrained(tmp_path / "text", save_embedding_layers=False)
    with pytest.raises(ValueError, match="embed_tokens.lora_embedding_A.*plain table"):
        UltraFuserForCausalLM.from_specialists(sources)
