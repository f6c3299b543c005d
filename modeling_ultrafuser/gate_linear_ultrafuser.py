"""The "linear" gate: one linear layer over all hidden states side by side."""

import torch
from torch import Tensor

from .gate_base_ultrafuser import OUTPUTS, STATES, Gate, empty, linear


class LinearGate(Gate):
    """One linear layer over all specialists' hidden states side by side, so that it can compare them."""

    can_calibrate = True
    axes = {"weight": (OUTPUTS, STATES), "bias": (OUTPUTS,)}

    def __init__(self, config):
        super().__init__(config)
        self.weight = empty(self.num_outputs, sum(c.hidden_size for c in config.specialists))
        self.bias = empty(self.num_outputs)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return linear(torch.cat(hidden_states, dim=-1), self.weight, self.bias)
