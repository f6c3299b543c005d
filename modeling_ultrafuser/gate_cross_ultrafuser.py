"""The "cross" gate: an MLP with a linear skip over all hidden states side by side."""

import torch
from torch import Tensor
from transformers import initialization as init

from .gate_base_ultrafuser import OUTPUTS, STATES, Gate, empty, linear


class CrossGate(Gate):
    """An MLP that reads all specialists' hidden states side by side, plus a linear layer that skips it.

    scores = W2 relu(W1 h + b1) + V h + b2 for h = [h_1, ..., h_N]. The paper's gate scores each hidden state alone and
    can say how sure a specialist looks; this one can also compare them. With W2 = 0 it is the "linear" gate.
    """

    has_width = True
    can_calibrate = True
    learning_rate = 3e-3
    axes = {
        "hidden_weight": (None, STATES),
        "score_weight": (OUTPUTS, None),
        "skip_weight": (OUTPUTS, STATES),
        "score_bias": (OUTPUTS,),
    }

    def __init__(self, config):
        super().__init__(config)
        size, width = sum(c.hidden_size for c in config.specialists), config.gate_hidden_size
        self.hidden_weight = empty(width, size)
        self.hidden_bias = empty(width)
        self.score_weight = empty(self.num_outputs, width)
        self.skip_weight = empty(self.num_outputs, size)
        self.score_bias = empty(self.num_outputs)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        states = torch.cat(hidden_states, dim=-1)
        hidden = linear(states, self.hidden_weight, self.hidden_bias).relu()
        return linear(hidden, self.score_weight, self.score_bias) + linear(states, self.skip_weight)

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.hidden_weight, std=self.hidden_weight.shape[1] ** -0.5)
