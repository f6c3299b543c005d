"""Inner products of the inputs of linear layers on a specialist's rows, which RegMean reads."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.measurement import HeldOut


@torch.inference_mode()
def inner_products(
    model: PreTrainedModel, data: HeldOut, layers: Iterable[str] | None = None, *, batch_size: int = 8
) -> dict[str, Tensor]:
    """Returns the mean of x x' over the tokens that each linear layer of a model reads.

    Args:
        model: A specialist.
        data: Rows of its domain.
        layers: Names of the layers. Default: all linear ones, and the head if it is not tied.
        batch_size: Examples at once.

    Returns:
        By layer, in float32, on the CPU. Shapes (in, in). Layers that read something else than one vector per token are not in
        it.
    """
    table = model.get_input_embeddings().weight
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is not table}
    wanted = {n: m for n, m in linear.items() if layers is None or n in layers}
    found: dict[str, Tensor] = {}
    kept: list[Tensor] = []

    def add(name: str, _, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:-1] == kept[0].shape:
            read = inputs[0][kept[0]].float()
            found[name] = found.get(name, 0) + read.T @ read

    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in wanted.items()]
    try:
        for start in range(0, len(data), batch_size):
            rows = data[start : start + batch_size]
            kept[:] = [rows.attention_mask.bool().to(model.device)]
            ids, mask = rows.input_ids.to(model.device), rows.attention_mask.to(model.device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / data.attention_mask.sum()).cpu() for name, total in found.items()}
