"""Rows of routers: what a specialist's feed-forward blocks read on its own domain."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from ..evaluation.measurement import HeldOut


@torch.inference_mode()
def router_rows(model: PreTrainedModel, data: HeldOut, *, batch_size: int = 8) -> Tensor:
    """Returns the mean of what enters each feed-forward block over all tokens, of length 1.

    That is the "hidden" way of mergekit, with each specialist reading its own rows.

    Args:
        model: A specialist whose blocks are `model.layers.N.mlp`.
        data: Rows of its domain.
        batch_size: Examples at once.

    Returns:
        In float32. Shape (layers, hidden).
    """
    blocks = [layer.mlp for layer in model.model.layers]
    sums, kept = torch.zeros(len(blocks), model.config.hidden_size, device=model.device), []

    def add(layer: int, _, inputs: tuple[Tensor, ...]) -> None:
        sums[layer] += inputs[0][kept[-1]].float().sum(0)

    hooks = [block.register_forward_pre_hook(partial(add, layer)) for layer, block in enumerate(blocks)]
    try:
        for start in range(0, len(data), batch_size):
            rows = data[start : start + batch_size]
            ids, mask = rows.input_ids.to(model.device), rows.attention_mask.to(model.device)
            kept.append(mask.bool())
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return F.normalize(sums, dim=-1).cpu()
