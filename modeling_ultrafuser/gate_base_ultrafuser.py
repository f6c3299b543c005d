"""What all gates share: from the specialists' last hidden states to one weight per specialist and token.

A gate's parameters are bare `nn.Parameter`s in float32 whatever the model's dtype: serving engines swap `nn.Linear`
modules for their own, and 16 bits are too coarse for scores that pass through a softmax.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init


class Gate(nn.Module):
    """Base of all gates: scores each specialist, then takes the softmax over specialists at `gate_temperature`.

    A gate is one file with one subclass, and one line in `GATES`. It owns its parameters and what becomes of them when
    a specialist is added or removed.

    Attributes:
        has_width: Whether it has a hidden layer, `gate_hidden_size` wide.
    """

    has_width = False

    def __init__(self, config):
        super().__init__()
        self.temperature = config.gate_temperature
        self.num_specialists = len(config.specialists)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        """Scores each specialist before the softmax.

        Args:
            hidden_states: Each specialist's last hidden state in float32. Shapes (batch, seq, hidden).

        Returns:
            Shape (batch, seq, specialists).
        """
        raise NotImplementedError

    def forward(self, hidden_states: list[Tensor]) -> Tensor:
        """Weighs the specialists at every token.

        Args:
            hidden_states: Each specialist's last hidden state, after its final norm. Shapes (batch, seq, hidden).

        Returns:
            Gate weights in float32: non-negative, summing to 1 over the last axis. Shape (batch, seq, specialists).
        """
        with torch.autocast(device_type=hidden_states[0].device.type, enabled=False):
            return (self.scores([h.float() for h in hidden_states]) / self.temperature).softmax(-1)

    def init_weights(self) -> None:
        """Starts uniform: an untrained fused model is the plain average of its specialists."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def without(self, index: int, config) -> dict[str, Tensor]:
        """Removes one specialist.

        Args:
            index: Index of the specialist.
            config: The fused model's configuration with that specialist.

        Returns:
            Tensors of the gate of the specialists that are left.

        Raises:
            ValueError: If the gate cannot keep what it learned.
        """
        raise NotImplementedError

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """Adds one specialist, the last. The scores of the others stay as they are.

        Args:
            name: Name of the new specialist.
            config: The fused model's configuration with the new specialist.

        Returns:
            Tensors of the gate of all specialists.
        """
        raise NotImplementedError


def empty(*shape: int) -> nn.Parameter:
    """Makes a parameter in float32 that `init_weights` fills."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies in float32: `model.to(torch.bfloat16)`, DeepSpeed and FSDP cast every parameter, a gate's too."""
    return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())


def others(index: int, config) -> Tensor:
    """Indices of all specialists but one. Shape (specialists - 1,)."""
    return torch.tensor([k for k in range(len(config.specialists)) if k != index])


def columns_of_others(index: int, config) -> Tensor:
    """Columns of all specialists but one among the hidden states side by side. Shape (their hidden sizes,)."""
    sizes = [c.hidden_size for c in config.specialists]
    return torch.cat([c for k, c in enumerate(torch.arange(sum(sizes)).split(sizes)) if k != index])


def with_equal_share(scores: Tensor, temperature: float) -> Tensor:
    """Appends a score whose softmax is 1 in all. Shape (specialists + 1,)."""
    score = temperature * ((scores / temperature).logsumexp(0) - math.log(len(scores)))
    return torch.cat([scores, score[None]])
