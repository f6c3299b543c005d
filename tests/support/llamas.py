"""A tiny Llama of transformers, for contract tests."""

import torch
from transformers import (
    LlamaForCausalLM,
)


IDS = torch.tensor([[3, 4, 5, 3, 4]])


def llama(kind=LlamaForCausalLM, **fields):
    torch.manual_seed(0)
    return kind(config(**fields)).eval()
