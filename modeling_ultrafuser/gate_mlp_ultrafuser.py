"""The "mlp" gate, the paper's: one MLP that all specialists share scores each hidden state alone."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .gate_base_ultrafuser import Gate, empty, linear


SHARED = "shared"


class MLPGate(Gate):
    """The paper's gate (Ding et al., 2024, section 3.1): one two-layer MLP, shared, scores each hidden state alone.

    score_k = w2 . relu(W1 h_k + b1). The paper's b2 adds one number to all scores, which the softmax takes out again: it
    is left out. Where hidden sizes differ, W1 is one per specialist and the rest is shared.
    """

    has_width = True

    def __init__(self, config):
        super().__init__(config)
        sizes = [c.hidden_size for c in config.specialists]
        shared = len(set(sizes)) == 1
        names = [SHARED] if shared else config.specialist_names
        self.names = [SHARED] * len(sizes) if shared else config.specialist_names
        width = config.gate_hidden_size
        self.hidden_weight = HiddenWeights({n: empty(width, d) for n, d in zip(names, sizes, strict=False)})
        self.hidden_bias = empty(width)
        self.score_weight = empty(1, width)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        hidden = self.hidden_weight(hidden_states, self.hidden_bias, self.names)
        return linear(hidden.relu(), self.score_weight).squeeze(-1)

    def init_weights(self) -> None:
        super().init_weights()
        for weight in self.hidden_weight.parameters():
            init.normal_(weight, std=weight.shape[1] ** -0.5)

    def without(self, index: int, config) -> dict[str, Tensor]:
        state = {key: t for key, t in self.state_dict().items() if key != _first_layer(config.specialist_names[index])}
        kept = [k for k in range(self.num_specialists) if k != index]
        if SHARED in self.names or len({config.specialists[k].hidden_size for k in kept}) > 1:
            return state
        names = [config.specialist_names[k] for k in kept]
        first, *rest = [state.pop(_first_layer(name)) for name in names]
        if not all(torch.equal(weight, first) for weight in rest):
            raise ValueError(
                f"An 'mlp' gate has one first layer for specialists of one hidden size, but {names}, which would be "
                f"left, have learned one each, and no single layer can say what they do. Fuse those specialists anew "
                f"and train the gate."
            )
        return state | {_first_layer(SHARED): first}

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """The new specialist is scored by the shared layers; of another hidden size, as a hidden state of zeros."""
        state, size = self.state_dict(), config.specialists[-1].hidden_size
        if SHARED in self.names:
            first = state[_first_layer(SHARED)]
            if first.shape[1] == size:
                return state
            del state[_first_layer(SHARED)]
            state |= {_first_layer(n): first.clone() for n in config.specialist_names[:-1]}
        return state | {_first_layer(name): torch.zeros(config.gate_hidden_size, size)}


def _first_layer(name: str) -> str:
    return f"hidden_weight.{name}"


class HiddenWeights(nn.Module):
    """The first layer of the "mlp" gate: weights by specialist, or one that all share.

    A module to call, where a `ParameterDict` to read would do: FSDP gathers a module's parameters when it is called,
    and makes a group of its own out of a module that stays in float32.
    """

    def __init__(self, weights: dict[str, nn.Parameter]):
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def forward(self, hidden_states: list[Tensor], bias: Tensor, names: list[str]) -> Tensor:
        """Applies to each specialist's hidden state the weight of that name. (batch, seq, specialists, width)"""
        if len(set(names)) == 1:
            return linear(torch.stack(hidden_states, dim=-2), getattr(self, names[0]), bias)
        pairs = zip(hidden_states, names, strict=True)
        return torch.stack([linear(h, getattr(self, name), bias) for h, name in pairs], dim=-2)
