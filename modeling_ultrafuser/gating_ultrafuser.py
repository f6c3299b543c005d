"""Gates: from the specialists' last hidden states to one weight per specialist and token.

A gate's parameters are bare `nn.Parameter`s in float32 whatever the model's dtype: serving engines swap `nn.Linear`
modules for their own, and 16 bits are too coarse for scores that pass through a softmax.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init


class Gate(nn.Module):
    """Base of all gates: scores each specialist, then takes the softmax over specialists at `gate_temperature`."""

    def __init__(self, config):
        super().__init__()
        self.temperature = config.gate_temperature
        self.num_specialists = len(config.specialists)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        """Unnormalised preference for each specialist. Shape (batch, seq, specialists)."""
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


class MLPGate(Gate):
    """The paper's gate (Ding et al., 2024, section 3.1): one two-layer MLP, shared, scores each hidden state alone.

    score_k = w2 . relu(W1 h_k + b1). The paper's b2 adds one number to all scores, which the softmax takes out again: it
    is left out. Where hidden sizes differ, W1 is one per specialist and the rest is shared.
    """

    def __init__(self, config):
        super().__init__(config)
        sizes = [c.hidden_size for c in config.specialists]
        shared = len(set(sizes)) == 1
        names = ["shared"] if shared else config.specialist_names
        self.names = ["shared"] * len(sizes) if shared else config.specialist_names
        width = config.gate_hidden_size
        self.hidden_weight = HiddenWeights({n: _empty(width, d) for n, d in zip(names, sizes, strict=False)})
        self.hidden_bias = _empty(width)
        self.score_weight = _empty(1, width)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        hidden = self.hidden_weight(hidden_states, self.hidden_bias, self.names)
        return _linear(hidden.relu(), self.score_weight).squeeze(-1)

    def init_weights(self) -> None:
        super().init_weights()
        for weight in self.hidden_weight.parameters():
            init.normal_(weight, std=weight.shape[1] ** -0.5)


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
            return _linear(torch.stack(hidden_states, dim=-2), getattr(self, names[0]), bias)
        own = zip(hidden_states, names, strict=True)
        return torch.stack([_linear(h, getattr(self, name), bias) for h, name in own], dim=-2)


class LinearGate(Gate):
    """One linear layer over all specialists' hidden states side by side, so that it can compare them."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = _empty(self.num_specialists, sum(c.hidden_size for c in config.specialists))
        self.bias = _empty(self.num_specialists)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return _linear(torch.cat(hidden_states, dim=-1), self.weight, self.bias)


class ConstantGate(Gate):
    """One learned number per specialist, the same at every token: tuned ensemble weights."""

    def __init__(self, config):
        super().__init__(config)
        self.logits = _empty(self.num_specialists)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return self.logits.float().expand(*hidden_states[0].shape[:-1], -1)


class UniformGate(Gate):
    """Equal weights and no parameters: the plain ensemble, and the baseline to beat."""

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return hidden_states[0].new_zeros(*hidden_states[0].shape[:-1], self.num_specialists)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def _linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # `model.to(torch.bfloat16)`, DeepSpeed and FSDP cast every parameter, these too
    return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())


GATES: dict[str, type[Gate]] = {"mlp": MLPGate, "linear": LinearGate, "constant": ConstantGate, "uniform": UniformGate}
