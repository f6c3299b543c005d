"""The "linear" gate: one linear layer over all hidden states side by side."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .gate_base_ultrafuser import (
    Gate,
    columns_of_others,
    empty,
    linear,
    rows_of_others,
    with_equal_share,
    with_rows_of_one_more,
)


class LinearGate(Gate):
    """One linear layer over all specialists' hidden states side by side, so that it can compare them."""

    can_calibrate = True

    def __init__(self, config):
        super().__init__(config)
        self.weight = empty(self.num_outputs, sum(c.hidden_size for c in config.specialists))
        self.bias = empty(self.num_outputs)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return linear(torch.cat(hidden_states, dim=-1), self.weight, self.bias)

    def without(self, index: int, config) -> dict[str, Tensor]:
        """Removes a specialist. What the gate read from it is missing from the others' scores: train it again."""
        kept = rows_of_others(index, config)
        weight = self.weight.detach()[kept][:, columns_of_others(index, config)]
        return {"weight": weight, "bias": self.bias.detach()[kept]}

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """The new specialist's score is a bias: an equal share if the others' biases were all they had."""
        weight = F.pad(self.weight.detach(), (0, config.specialists[-1].hidden_size))
        return {
            "weight": with_rows_of_one_more(weight, config),
            "bias": with_equal_share(self.bias.detach(), config),
        }
