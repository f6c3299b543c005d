"""Specialists that are LoRA adapters (Hu et al., 2021, arXiv 2106.09685) of one base, run as rows of one batch.

The base is in memory once and read once per token. Every text is there once for each specialist: row b * N + k is text
b as specialist k reads it. All rows go through the base's weights together, and each through its own adapter.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .compat_ultrafuser import drop_plans


# what PEFT adapts as x W^T; the second keeps W transposed
LINEAR = (nn.Linear, Conv1D)
MERGE_FIRST = (
    "merge each into its base, `AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()` and "
    "`.save_pretrained(...)`, and fuse whole models"
)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Width of what a linear layer returns, and of what it reads."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


class Rows:
    """Number of rows that the running layer reads, for its parts that read tokens end to end."""

    count: int | None = None

    def note(self, layer, arguments) -> None:
        """Hook of a layer that is about to run, be it a second time, in the backward pass."""
        self.count = len(arguments[0])


class AdaptedLinear(nn.Module):
    """A linear layer of the base with an adapter for each specialist: x W^T + x A_k^T B_k.

    The adapters' scale is a part of B. One of lower rank has zeros behind its own, and where a specialist has none both
    parts are zeros.

    Args:
        base_layer: The base's. It stays a layer of its own, so that quantisers find it.
        specialists: How many.
        rank: The highest among the adapters.
        rows: Of the base that it is a part of.
    """

    def __init__(self, base_layer: nn.Module, specialists: int, rank: int, rows: Rows):
        super().__init__()
        self.base_layer, self.rows = base_layer, rows
        out_features, in_features = linear_shape(base_layer)
        like = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.Parameter(torch.zeros(specialists, rank, in_features, **like))
        # rank first, unlike in PEFT: a processor multiplies few rows by it faster
        self.lora_B = nn.Parameter(torch.zeros(specialists, rank, out_features, **like))

    @property
    def weight(self) -> nn.Parameter:
        """The base's, which some families ask their layers for."""
        return self.base_layer.weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shapes (batch * specialists, ..., in) to (batch * specialists, ..., out); or all tokens end to end, (-1, in)."""
        output = self.base_layer(hidden_states)
        specialists, shape = len(self.lora_A), output.shape
        rows = len(hidden_states) if hidden_states.ndim > 2 else self.rows.count
        if not rows or rows % specialists or (hidden_states.ndim == 2 and len(hidden_states) % rows):
            raise ValueError(
                f"Adapters of one base are rows of one batch, but a layer of it reads tokens of shape "
                f"{tuple(hidden_states.shape)}, which does not tell the rows of {specialists} specialists apart. Merge "
                f"each adapter into its base, and fuse whole models."
            )
        hidden_states, output = (t.reshape(rows, -1, t.shape[-1]) for t in (hidden_states, output))
        seq = hidden_states.shape[1]
        if rows == specialists:
            return torch.baddbmm(output, torch.bmm(hidden_states, self.lora_A.mT), self.lora_B).view(shape)
        own = hidden_states.unflatten(0, (-1, specialists)).transpose(0, 1).flatten(1, 2)
        change = torch.bmm(torch.bmm(own, self.lora_A.mT), self.lora_B)
        change = change.unflatten(1, (-1, seq)).transpose(0, 1)
        return (output.unflatten(0, (-1, specialists)) + change).view(shape)

    @torch.no_grad()
    def merged(self, k: int) -> nn.Module:
        """Specialist k's own linear layer, a copy."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise ValueError(
                "An adapter is merged into the plain weights of its base, but those of this model are quantised. Load "
                "it without `quantization_config` first."
            )
        if type(self.base_layer) is nn.Linear:
            with torch.device("meta"):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            linear = copy.deepcopy(self.base_layer)
        # rounded once, at the end
        own = weight.float() if weight.element_size() < 4 else weight
        change = self.lora_B[k].T.to(own.dtype) @ self.lora_A[k].to(own.dtype)
        if isinstance(linear, Conv1D):
            change = change.T
        linear.weight = nn.Parameter((own + change).to(weight.dtype))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear


def add_adapters(base: PreTrainedModel, config) -> None:
    """Puts adapters of zeros on the base's linear layers that the configuration names.

    Raises:
        ValueError: If it has no such layers.
    """
    targets = set(config.adapters["target_modules"])
    chosen = [n for n, m in base.named_modules() if isinstance(m, LINEAR) and n.rpartition(".")[2] in targets]
    missing = targets - {n.rpartition(".")[2] for n in chosen}
    if missing:
        raise ValueError(
            f"Adapters are on linear layers of the base, but {type(base).__name__} has none of the name "
            f"{sorted(missing)}. Correct `adapters` in the configuration, or fuse merged models."
        )
    rows = Rows()
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(rows.note)
    for name in chosen:
        owner, _, leaf = name.rpartition(".")
        layer = AdaptedLinear(base.get_submodule(name), len(config.specialists), config.adapters["rank"], rows)
        setattr(base.get_submodule(owner), leaf, layer)
    drop_plans(base)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Both matrices of all adapters, of all specialists. Their first dimension is specialists."""
    layers = (m for m in model.modules() if isinstance(m, AdaptedLinear))
    return [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]


def merged_backbone(base: PreTrainedModel, k: int) -> PreTrainedModel:
    """Specialist k's backbone with its adapter merged, a copy."""
    backbone = copy.deepcopy(base)
    for name, layer in base.named_modules():
        if isinstance(layer, AdaptedLinear):
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(owner), leaf, layer.merged(k))
    return backbone


def layout(adapters: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> dict:
    """Returns the configuration's `adapters` for what `pairs` of `lora_ultrafuser.py` returns, by specialist."""
    found = [(layer.rpartition(".")[2], len(a)) for own in adapters.values() for layer, (a, _) in own.items()]
    if not found:
        raise ValueError("Specialists that are adapters of one base must differ, but none of them changes a layer.")
    return {"rank": max(rank for _, rank in found), "target_modules": sorted({leaf for leaf, _ in found})}


def adapted_state(backbone: nn.Module, state: dict[str, Tensor], adapters: dict[str, dict]) -> dict[str, Tensor]:
    """The tensors of a base with adapters, out of its own and of what `pairs` returns, by specialist.

    Args:
        backbone: The base's, with layers for adapters; on the meta device is enough.
        state: The tensors of the base's own backbone.
        adapters: Name to layer to A and B, in the order of the specialists.
    """
    state = dict(state)
    for name, module in backbone.named_modules():
        if not isinstance(module, AdaptedLinear):
            continue
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                state[f"{name}.base_layer.{part}"] = state.pop(f"{name}.{part}")
        dtype = state[f"{name}.base_layer.weight"].dtype
        a, b = (torch.zeros(p.shape, dtype=dtype, device="cpu") for p in (module.lora_A, module.lora_B))
        for k, own in enumerate(adapters.values()):
            if name in own:
                rank = len(own[name][0])
                a[k, :rank], b[k, :rank] = own[name]
        state |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    return state
