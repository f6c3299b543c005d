"""Base of all gates: from the specialists' last hidden states to one weight per specialist and token.

A gate's parameters are bare `nn.Parameter`s in float32 whatever the model's dtype: serving engines swap `nn.Linear`
modules for their own, and 16 bits are too coarse for scores that pass through a softmax.
"""

import math
from enum import Flag, auto
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init

from .fusions_ultrafuser import FUSIONS
from .sparsifiers_ultrafuser import sparsifier


# a learned factor on logits stays between exp(-2) and exp(2)
LARGEST_LOG_SCALE = 2.0
# what an axis of a parameter runs over: scores and scales, all hidden states side by side, or specialists
OUTPUTS, STATES, SPECIALISTS = "outputs", "states", "specialists"


class GateOutput(NamedTuple):
    """Output of a gate.

    Attributes:
        weights: Share of each specialist in each token in float32: non-negative, summing to 1 over the last axis. Shape
            (batch, seq, specialists).
        scales: Factors on the logits of each token in float32, or None without `gate_calibration`. One for the fused
            logits, shape (batch, seq, 1), or one for the logits of each specialist, shape (batch, seq, specialists), as
            the fusion rule has it: see `Fusion.scale_for_each`.
    """

    weights: Tensor
    scales: Tensor | None = None


class Evidence(NamedTuple):
    """Inputs that a gate reads of the past, see `accumulated` in `evidence_ultrafuser.py`.

    Attributes:
        decays: Of sums of log-probabilities.
        switches: Switch probabilities of fixed-share forecasters.
    """

    decays: tuple[float, ...] = ()
    switches: tuple[float, ...] = ()


class Reads(Flag):
    """Inputs that a gate reads to weigh the specialists; `STATES | PAST` is both.

    Attributes:
        NOTHING: Neither the text nor what specialists make of it.
        PROMPT: Token ids.
        STATES: The specialists' last hidden states.
        PAST: How well each specialist has predicted the text so far.
    """

    NOTHING = 0
    PROMPT = auto()
    STATES = auto()
    PAST = auto()


class Gate(nn.Module):
    """Base of all gates: scores, divided by `gate_temperature`, made fewer by `gate_sparsifier`, normalised to weights.

    With `gate_calibration` it also predicts temperatures, token by token (after Guo et al., 2017, arXiv 1706.04599, whose
    temperature is one number): how sure the fused model, or each specialist of a probability mixture, should be.

    A gate is one file with one subclass, and one line in `GATES`. It owns its parameters and what becomes of them when
    a specialist is added or removed: `axes` says so, or else it overrides `without` and `with_one_more`.

    Attributes:
        has_width: Whether it has a hidden layer, `gate_hidden_size` wide.
        can_calibrate: Whether it can also predict temperatures.
        learning_rate: Peak learning rate of stage one that suits it beside specialists of a million parameters.
        dropout: Probability with which training hides each number of the hidden states: the trainers set it.
        reads: What it reads. One that reads neither states nor the past is asked before the specialists run.
        evidence: What of the past.
        axes: What each axis of each parameter runs over that changes with the specialists: `OUTPUTS`, `STATES`,
            `SPECIALISTS`, or None.
    """

    has_width = False
    can_calibrate = False
    learning_rate = 1e-2
    dropout = 0.0
    reads = Reads.STATES
    evidence = Evidence()
    axes: dict[str, tuple[str | None, ...]] = {}

    def __init__(self, config):
        super().__init__()
        self.temperature = config.gate_temperature
        self.sparsifier = sparsifier(config.gate_sparsifier)
        self.num_specialists = len(config.specialists)
        self.num_outputs = self.num_specialists + num_scales(config)

    def scores(self, hidden_states: list[Tensor], *evidence: Tensor) -> Tensor:
        """Scores each specialist before the softmax, then gives the logarithms of the scales, if there are any.

        Args:
            hidden_states: As for `forward`, in float32.
            *evidence: Of a gate that reads the past, what it does. Shape (batch, seq, specialists, numbers).

        Returns:
            Shape (batch, seq, specialists + scales).
        """
        raise NotImplementedError

    def forward(self, hidden_states: list[Tensor], *evidence: Tensor) -> GateOutput:
        """Weighs the specialists at every token.

        Args:
            hidden_states: Each specialist's last hidden state, after its final norm. Shapes (batch, seq, hidden). If it
                is asked before the specialists run, the token ids alone. Shape (batch, seq, 1).
            *evidence: As for `scores`.
        """
        with torch.autocast(device_type=hidden_states[0].device.type, enabled=False):
            states = [F.dropout(h.float(), self.dropout, self.training) for h in hidden_states]
            scores = self.scores(states, *evidence)
            weights = self.normalised(self.sparsifier(scores[..., : self.num_specialists] / self.temperature))
            if self.num_outputs == self.num_specialists:
                return GateOutput(weights)
            log_scales = scores[..., self.num_specialists :]
            return GateOutput(weights, log_scales.clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp())

    def normalised(self, scores: Tensor) -> Tensor:
        """Turns scores into weights: by a softmax over specialists. Shape (batch, seq, specialists)."""
        return scores.softmax(-1)

    def init_weights(self) -> None:
        """Starts uniform and with scales of 1: an untrained fused model is the plain average of its specialists."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def without(self, index: int, config) -> dict[str, Tensor]:
        """Removes one specialist. What the gate read from it is missing from the others' scores: train it again.

        Args:
            index: Index of the specialist.
            config: The fused model's configuration with that specialist.

        Returns:
            Tensors of the gate of the specialists that are left.

        Raises:
            ValueError: If the gate cannot keep what it learned.
        """
        others = torch.tensor([k for k in range(self.num_specialists) if k != index])
        kept = {OUTPUTS: rows_of_others(index, config), STATES: columns_of_others(index, config), SPECIALISTS: others}
        state = self.state_dict()
        for key, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                if axis is not None:
                    state[key] = state[key].index_select(dim, kept[axis].to(state[key].device))
        return state

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """Adds one specialist, the last. The scores of the others stay as they are.

        Its score is a bias: an equal share if the others' biases were all they had.

        Args:
            name: Name of the new specialist.
            config: The fused model's configuration with the new specialist.

        Returns:
            Tensors of the gate of all specialists.
        """
        state, added = self.state_dict(), {STATES: config.specialists[-1].hidden_size, SPECIALISTS: 1}
        for key, axes in self.axes.items():
            for behind, axis in enumerate(reversed(axes)):
                state[key] = F.pad(state[key], (0, 0) * behind + (0, added.get(axis, 0)))
            if axes == (OUTPUTS,):
                state[key] = with_equal_share(state[key], config)
            elif axes[0] == OUTPUTS:
                state[key] = with_rows_of_one_more(state[key], config)
        return state


def asked_first(gate: nn.Module, input_ids: Tensor) -> GateOutput | None:
    """Asks a gate before the specialists run; returns None if it reads what they say. `input_ids`: (batch, seq)."""
    return None if gate.reads & (Reads.STATES | Reads.PAST) else gate([input_ids[..., None]])


def empty(*shape: int) -> nn.Parameter:
    """Makes a parameter in float32 that `init_weights` fills."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies in float32: `model.to(torch.bfloat16)`, DeepSpeed and FSDP cast every parameter, a gate's too."""
    return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())


def num_scales(config) -> int:
    """Counts the factors on logits that a calibrated gate predicts for a token."""
    if not config.gate_calibration:
        return 0
    return len(config.specialists) if FUSIONS[config.fusion].scale_for_each else 1


def rows_of_others(index: int, config) -> Tensor:
    """Rows of a gate's outputs, scores and scales, without those of one specialist."""
    number = len(config.specialists)
    gone = {index, number + index} if FUSIONS[config.fusion].scale_for_each else {index}
    return torch.tensor([row for row in range(number + num_scales(config)) if row not in gone])


def columns_of_others(index: int, config) -> Tensor:
    """Columns of all specialists but one among the hidden states side by side. Shape (their hidden sizes,)."""
    sizes = [c.hidden_size for c in config.specialists]
    return torch.cat([c for k, c in enumerate(torch.arange(sum(sizes)).split(sizes)) if k != index])


def with_rows_of_one_more(rows: Tensor, config, score: Tensor | None = None) -> Tensor:
    """Adds the rows of one more specialist, the last: its score, zeros by default, and a scale of 1 if it has one.

    Args:
        rows: Rows of a gate's outputs. Shape (specialists + scales, ...).
        config: The fused model's configuration with the new specialist.
        score: Row of its score. Shape (1, ...).
    """
    scores, scales = rows.tensor_split([len(config.specialists) - 1])
    zeros = torch.zeros_like(rows[:1])
    added = [zeros] if len(scales) and FUSIONS[config.fusion].scale_for_each else []
    return torch.cat([scores, zeros if score is None else score, scales, *added])


def with_equal_share(bias: Tensor, config) -> Tensor:
    """Adds the outputs of one more specialist, whose score has a softmax of 1 in all. Shape (specialists + scales,)."""
    scores = bias[: len(config.specialists) - 1] / config.gate_temperature
    score = config.gate_temperature * (scores.logsumexp(0) - math.log(len(scores)))
    return with_rows_of_one_more(bias, config, score[None])
