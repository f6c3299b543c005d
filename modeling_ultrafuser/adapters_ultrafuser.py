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
# names of what is no linear layer of the backbone, among the layers that adapters are on; and of the head's module there
EMBEDDING, HEAD = "adapted_embedding", "adapted_head"
# fields of the configuration's `adapters` that are there only if an adapter is on the embedding, or on the head
EMBEDDING_RANK, HEAD_RANK = "embedding_rank", "head_rank"
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
        _check_plain(weight)
        if type(self.base_layer) is nn.Linear:
            with torch.device("meta"):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            linear = copy.deepcopy(self.base_layer)
        b, a = self.lora_B[k].T, self.lora_A[k]
        factors = (a.T, b.T) if isinstance(linear, Conv1D) else (b, a)
        linear.weight = nn.Parameter(changed(weight, *factors))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear


class AdaptedEmbedding(nn.Module):
    """A token embedding of the base with an adapter for each specialist: E[x] + A_k[x] B_k.

    The adapters' scale is a part of B. One of lower rank has zeros behind its own.

    Args:
        base_layer: The base's.
        specialists: How many.
        rank: The highest among the adapters.
    """

    def __init__(self, base_layer: nn.Embedding, specialists: int, rank: int):
        super().__init__()
        self.base_layer = base_layer
        like = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.Parameter(torch.zeros(specialists, base_layer.num_embeddings, rank, **like))
        self.lora_B = nn.Parameter(torch.zeros(specialists, rank, base_layer.embedding_dim, **like))

    @property
    def weight(self) -> nn.Parameter:
        """The base's."""
        return self.base_layer.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Shapes (batch * specialists, seq) to (batch * specialists, seq, hidden)."""
        specialists, seq = len(self.lora_A), input_ids.shape[-1]
        own = input_ids.unflatten(0, (-1, specialists)).transpose(0, 1).flatten(1)
        which = torch.arange(specialists, device=own.device)[:, None]
        change = torch.bmm(self.lora_A[which, own], self.lora_B).unflatten(1, (-1, seq))
        return self.base_layer(input_ids) + change.transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def merged(self, k: int) -> nn.Embedding:
        """Specialist k's own embedding, a copy."""
        _check_plain(self.weight)
        embedding = copy.deepcopy(self.base_layer)
        embedding.weight = nn.Parameter(changed(self.weight, self.lora_A[k], self.lora_B[k]))
        return embedding


class AdaptedHead(nn.Module):
    """Low-rank changes of the head for each specialist, W + B_k A_k: their part that comes before the wide head.

    The wide head is [W | B_1 | ... | B_N], linear as ever. It reads h_k and, in the columns of specialist k alone, A_k h_k.

    Args:
        base: The backbone, for its device and dtype.
        width: Of its last hidden states.
        specialists: How many.
        rank: The highest among the adapters.
    """

    def __init__(self, base: PreTrainedModel, width: int, specialists: int, rank: int):
        super().__init__()
        like = {"device": base.get_input_embeddings().weight.device, "dtype": base.dtype}
        self.lora_A = nn.Parameter(torch.zeros(specialists, rank, width, **like))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Puts A_k h_k behind h_k, zeros in the columns of the others.

        Shapes (batch * specialists, seq, hidden) to (batch * specialists, seq, hidden + specialists * rank).
        """
        own = hidden_states.unflatten(0, (-1, len(self.lora_A)))
        low = torch.einsum("bksd,krd->bksr", own, self.lora_A)
        places = torch.eye(len(self.lora_A), dtype=low.dtype, device=low.device)[:, None, :, None]
        apart = (low[..., None, :] * places).flatten(-2)
        return torch.cat([own, apart], dim=-1).flatten(0, 1)

    @torch.no_grad()
    def merged(self, k: int, head: Tensor) -> Tensor:
        """Specialist k's own head, a copy, from the weight of the wide head. Shape (vocab, hidden)."""
        _check_plain(head)
        specialists, rank, width = self.lora_A.shape
        weight, b = head[:, :width], head[:, width:].unflatten(1, (specialists, rank))[:, k]
        return changed(weight, b, self.lora_A[k].to(b.device))


def changed(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds a product of two matrices to a weight, rounding once, at the end."""
    wide = weight.float() if weight.element_size() < 4 else weight
    return (wide + left.to(wide.dtype) @ right.to(wide.dtype)).to(weight.dtype)


def _check_plain(weight: Tensor) -> None:
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        raise ValueError(
            "An adapter is merged into the plain weights of its base, but those of this model are quantised. Load "
            "it without `quantization_config` first."
        )


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
    rows, number = Rows(), len(config.specialists)
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(rows.note)
    for name in chosen:
        _replace(base, name, AdaptedLinear(base.get_submodule(name), number, config.adapters["rank"], rows))
    if rank := config.adapters.get(EMBEDDING_RANK):
        embedding = plain_embedding(base)
        if embedding is None:
            raise ValueError(
                f"An adapter on the embedding is a table added to a plain one, but that of {type(base).__name__} is "
                f"another. Correct `adapters` in the configuration, or fuse merged models."
            )
        _replace(base, embedding, AdaptedEmbedding(base.get_submodule(embedding), number, rank))
    if rank := config.adapters.get(HEAD_RANK):
        base.add_module(HEAD, AdaptedHead(base, config.specialists[0].hidden_size, number, rank))
    drop_plans(base)


def _replace(base: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(base.get_submodule(owner), leaf, layer)


def plain_embedding(backbone: PreTrainedModel) -> str | None:
    """Returns the name of a backbone's token embedding, if it is a table and no more."""
    embedding = backbone.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    return next(name for name, module in backbone.named_modules() if module is embedding)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Both matrices of all adapters but the head's, of all specialists. Their first dimension is specialists."""
    layers = (m for m in model.modules() if isinstance(m, AdaptedLinear | AdaptedEmbedding))
    return [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]


def merged_backbone(base: PreTrainedModel, k: int) -> PreTrainedModel:
    """Specialist k's backbone with its adapter merged, a copy."""
    backbone = copy.deepcopy(base)
    if hasattr(backbone, HEAD):
        delattr(backbone, HEAD)
    for name, layer in base.named_modules():
        if isinstance(layer, AdaptedLinear | AdaptedEmbedding):
            _replace(backbone, name, layer.merged(k))
    return backbone


def layout(adapters: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> dict:
    """Returns the configuration's `adapters` for what `pairs` of `lora_ultrafuser.py` returns, by specialist."""
    ranks: dict[str, int] = {}
    for layer, (a, _) in (pair for own in adapters.values() for pair in own.items()):
        ranks[layer] = max(ranks.get(layer, 0), len(a))
    if not ranks:
        raise ValueError("Specialists that are adapters of one base must differ, but none of them changes a layer.")
    more = {EMBEDDING_RANK: ranks.pop(EMBEDDING, 0), HEAD_RANK: ranks.pop(HEAD, 0)}
    targets = sorted({layer.rpartition(".")[2] for layer in ranks})
    found = {"rank": max(ranks.values(), default=1), "target_modules": targets}
    return found | {field: rank for field, rank in more.items() if rank}


def adapted_state(backbone: nn.Module, state: dict[str, Tensor], adapters: dict[str, dict]) -> dict[str, Tensor]:
    """The tensors of a base with adapters, out of its own and of what `pairs` returns, by specialist.

    Args:
        backbone: The base's, with layers for adapters; on the meta device is enough.
        state: The tensors of the base's own backbone.
        adapters: Name to layer to A and B, in the order of the specialists.
    """
    state = dict(state)
    for name, module in backbone.named_modules():
        if not isinstance(module, AdaptedLinear | AdaptedEmbedding):
            continue
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                state[f"{name}.base_layer.{part}"] = state.pop(f"{name}.{part}")
        dtype = state[f"{name}.base_layer.weight"].dtype
        a, b = (torch.zeros(p.shape, dtype=dtype, device="cpu") for p in (module.lora_A, module.lora_B))
        is_table = isinstance(module, AdaptedEmbedding)
        for k, own in enumerate(adapters.values()):
            if (layer := EMBEDDING if is_table else name) in own:
                left, right = own[layer]
                # a table has a row for each token of the fused vocabulary
                (a[k].T if is_table else a[k])[: len(left)] = left[:, : a.shape[1]] if is_table else left
                b[k, : len(right)] = right
        state |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
    return state


def adapted_head(head: Tensor, module: AdaptedHead, adapters: dict[str, dict], scale: float) -> Tensor:
    """Fills in the part of the adapters in the wide head.

    Args:
        head: The wide head's weight, the base's in its first columns. The others are written. Shape (vocab, width).
        module: On the meta device is enough.
        adapters: Name to layer to A and B, in the order of the specialists.
        scale: Factor of the base's own logits, which the head has in it.

    Returns:
        The tensor of `module`.
    """
    specialists, rank, width = module.lora_A.shape
    a = torch.zeros(module.lora_A.shape, dtype=head.dtype)
    b = head[:, width:].zero_().unflatten(1, (specialists, rank))
    for k, own in enumerate(adapters.values()):
        if HEAD in own:
            low, high = own[HEAD]
            a[k, : len(low)], b[:, k, : len(low)] = low, (high * scale)[:, : len(head)].T
    return a
