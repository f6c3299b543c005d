"""Tiny specialists of several families, and a tokenizer for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_ultrafuser.gates_ultrafuser import GATES


VOCAB = 99


def specialist(family="llama", *, layers=2, hidden_size=32, vocab_size=VOCAB, tied=False, **fields):
    """A small random causal language model, its weights large enough for opinions to differ from token to token."""
    defaults = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "gpt_neox" else 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**defaults, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer(vocab_size=VOCAB, *, chat_template=None, swap=None):
    """A character tokenizer: ids 0 to 2 are padding, begin and end, the rest printable characters.

    `swap` exchanges the ids of two characters, to make a tokenizer that differs.
    """
    tokens = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))][:vocab_size]
    if swap:
        a, b = map(tokens.index, swap)
        tokens[a], tokens[b] = tokens[b], tokens[a]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=chat_template,
    )


# every gate by a word for it, where one of the specialists is "text"
GATE_WORDS = {name if gate.parsed(None) is not None else f"{name}:text": gate for name, gate in GATES.items()}


def stir_gate(model):
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
