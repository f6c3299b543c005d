"""Folders and models of kinds that can be fused and of kinds that cannot."""

import json
import re

from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.support.tiny import specialist, tokenizer


def save(model, folder, words=None):
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def edit_config(folder, drop=(), **fields):
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(config | fields))


def saying(*words):
    """A pattern that finds all of these, in any order."""
    return re.compile("".join(f"(?=.*{re.escape(w)})" for w in words), flags=re.DOTALL)


def encoder():
    config = BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return BertForMaskedLM(config)


def vision():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def headless():
    return LlamaModel(specialist(layers=1, hidden_size=16).config)


def classifier():
    return LlamaForSequenceClassification(specialist(layers=1, hidden_size=16).config)


def small(**fields):
    return specialist(**{"layers": 1, "hidden_size": 16, **fields})


def inkling(**fields):
    """A mixture of experts that divides its last hidden states, and may pad its vocabulary."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "d_rel": 4}
    window = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 4, "sliding_window_size": 8}
    return specialist("inkling_text", layers=1, hidden_size=16, **sizes | window | fields)


def gemma3():
    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "query_pre_attn_scalar": 8}
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "eos_token_id": 2}
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config).eval()


def llava():
    text = small().config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)).eval()
