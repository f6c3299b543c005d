"""A tiny Llama of transformers, for contract tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


CONFIG = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = torch.tensor([[3, 4, 5, 3, 4]])


def config(**fields):
    return LlamaConfig(**CONFIG, **fields)


def llama(kind=LlamaForCausalLM, **fields):
    torch.manual_seed(0)
    return kind(config(**fields)).eval()
