"""A tiny model of every causal family of the installed transformers."""

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from tests.support.tiny import VOCAB


MOST_PARAMETERS = 8_000_000


STEPS = 5


# small values of fields, for every configuration that has a field of that name
SMALL = {
    **{"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
    **{"max_position_embeddings": 256, "n_positions": 256, "is_decoder": True, "sliding_window": 6},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 16),
    **{"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_num_heads": 4, "linear_head_dim": 8, "num_kv_shared_layers": 0, "rotary_dim": 4, "window_size": 6},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    **{"mamba_n_groups": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 8},
    **dict.fromkeys(("num_layers", "num_heads"), 2),
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "layerdrop": 0.0},
}


# where those do not make a model
HYBRID = ["linear_attention", "full_attention"]


FIELDS: dict[str, dict] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"layer_types": HYBRID},
    "dbrx": {"max_seq_len": 256, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"]},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), {"layer_types": HYBRID}),
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
}


class NotTinyError(Exception):
    """A family that cannot be built small here."""


def config_of(family: str) -> PreTrainedConfig:
    """The smallest useful configuration of a family, its parts included."""
    return _small(next(c for c in MODEL_FOR_CAUSAL_LM_MAPPING if c.model_type == family), FIELDS.get(family, {}))


def _small(kind: type[PreTrainedConfig], fields: dict) -> PreTrainedConfig:
    default = kind()
    parts = {}
    for name in kind.sub_configs:
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            small = _small(type(getattr(default, name)), FIELDS.get(getattr(default, name).model_type, {}))
            parts[name] = small.to_dict()
    known = {k: v for k, v in SMALL.items() if _has(default, k)}
    if known.get("sliding_window") and not getattr(default, "sliding_window", None):
        del known["sliding_window"]
    if "kv_lora_rank" in known:
        known |= {"num_key_value_heads": 4, "head_dim": known["qk_rope_head_dim"]}
    return kind(**(known | parts | fields))


def _has(config: PreTrainedConfig, field: str) -> bool:
    if isinstance(getattr(type(config), field, None), property):
        return False
    return field in type(config).__dataclass_fields__ or field in config.attribute_map or hasattr(config, field)


def build(family: str, seed: int) -> PreTrainedModel:
    """A small random model of a family, that does not stop by itself."""
    try:
        config = config_of(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotTinyError(f"{size / 1e6:.0f} million parameters")
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).eval()
        if not model(input_ids=prompt()).logits.isfinite().all():
            raise NotTinyError("its logits are not finite")
    except NotTinyError:
        raise
    except Exception as error:
        raise NotTinyError(said(error)) from error
    return unending(model)


def unending(model):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": STEPS, "do_sample": False} | options
    return model.generate(ids, **options)


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
