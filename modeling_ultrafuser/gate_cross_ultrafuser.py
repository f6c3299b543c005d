"""The "cross" gate: an MLP with a linear skip over all hidden states side by side."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init

from .gate_base_ultrafuser import (
    Gate,
    columns_of_others,
    empty,
    linear,
    rows_of_others,
    with_equal_share,
    with_rows_of_one_more,
)


class CrossGate(Gate):
    """An MLP that reads all specialists' hidden states side by side, plus a linear layer that skips it.

    scores = W2 relu(W1 h + b1) + V h + b2 for h = [h_1, ..., h_N]. The paper's gate scores each hidden state alone and
    can say how sure a specialist looks; this one can also compare them. With W2 = 0 it is the "linear" gate.
    """

    has_width = True
    can_calibrate = True
    learning_rate = 3e-3

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

    def without(self, index: int, config) -> dict[str, Tensor]:
        """Removes a specialist. What the gate read from it is missing from the others' scores: train it again."""
        kept, columns, state = rows_of_others(index, config), columns_of_others(index, config), self.state_dict()
        return {
            "hidden_weight": state["hidden_weight"][:, columns],
            "hidden_bias": state["hidden_bias"],
            "score_weight": state["score_weight"][kept],
            "skip_weight": state["skip_weight"][kept][:, columns],
            "score_bias": state["score_bias"][kept],
        }

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """The new specialist's score is a bias: an equal share if the others' biases were all they had."""
        size, state = config.specialists[-1].hidden_size, self.state_dict()
        return {
            "hidden_weight": F.pad(state["hidden_weight"], (0, size)),
            "hidden_bias": state["hidden_bias"],
            "score_weight": with_rows_of_one_more(state["score_weight"], config),
            "skip_weight": with_rows_of_one_more(F.pad(state["skip_weight"], (0, size)), config),
            "score_bias": with_equal_share(state["score_bias"], config),
        }
