"""What a model says greedily, computed without the code under test."""

import torch

from tests.support.tiny import tokenizer


def generated(model, prompt, tokens=12):
    """New token ids after a prompt, greedily, and who speaks for each: the gate's weights one position before."""
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return whole[0, ids.shape[-1] :], model.gate_weights(whole)[0, ids.shape[-1] - 1 : -1]


def decoded(ids):
    return tokenizer().decode(ids, skip_special_tokens=True)
