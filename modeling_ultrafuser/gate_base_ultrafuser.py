"""Base of all gates: from the specialists' last hidden states to one weight per specialist and token.

A gate's parameters are bare `nn.Parameter`s in float32 whatever the model's dtype: serving engines swap `nn.Linear`
modules for their own, and 16 bits are too coarse for scores that pass through a softmax.
"""

import math
import re
from enum import Flag, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init

from .fusions_ultrafuser import fusion_class
from .sparsifiers_ultrafuser import sparsifier


WIDEST = 1 << 16  # a hidden layer
# a learned factor on logits stays between exp(-2) and exp(2)
LARGEST_LOG_SCALE = 2.0
# what an axis of a parameter runs over: scores and scales, all hidden states side by side, or specialists
OUTPUTS, STATES, SPECIALISTS = "outputs", "states", "specialists"


class GateOutput(NamedTuple):
    """Output of a gate.

    Attributes:
        weights: Share of each specialist in each token in float32: non-negative, summing to 1 over the last axis, unless
            weights are signed. Shape (batch, seq, specialists).
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

    With `signed_weights` scores are added to those instead, see `signed_ultrafuser.py`.

    While it trains, no specialist is left out: one without a weight has no gradient, and could not come back.

    With `gate_calibration` it also predicts temperatures, token by token (after Guo et al., 2017, arXiv 1706.04599, whose
    temperature is one number): how sure the fused model, or each specialist of a probability mixture, should be.

    A gate is one file with one subclass, and one line in `GATES`. It owns its parameters and what becomes of them when
    a specialist is added or removed: `axes` says so, or else it overrides `without` and `with_one_more`.

    Attributes:
        has_width: Whether it has a hidden layer, `gate_hidden_size` wide.
        can_calibrate: Whether it can also predict temperatures.
        can_be_signed: Whether its scores begin at 0, so that they can be added to signed weights.
        learning_rate: Peak learning rate of stage one that suits it beside specialists of a million parameters.
        dropout: Probability with which training hides each number of the hidden states: the trainers set it.
        reads: What it reads. One that reads neither states nor the past runs before the specialists.
        evidence: What it reads of the past.
        axes: What each axis of each parameter runs over that changes with the specialists: `OUTPUTS`, `STATES`,
            `SPECIALISTS`, or None.
        format_version: The first format of saved folders that knows the gate.
    """

    has_width = False
    can_calibrate = False
    can_be_signed = True
    learning_rate = 1e-2
    dropout = 0.0
    reads = Reads.STATES
    evidence = Evidence()
    axes: dict[str, tuple[str | None, ...]] = {}
    format_version = 1

    def __init__(self, config):
        super().__init__()
        self.temperature = config.gate_temperature
        self.sparsifier = sparsifier(config.gate_sparsifier)
        self.signed: list[float] | None = config.signed_weights
        self.num_specialists = len(config.specialists)
        self.widths = [c.hidden_size for c in config.specialists]
        self.num_outputs = len(owners(config)[OUTPUTS])

    @classmethod
    def parsed(cls, setting: str | None) -> dict[str, Any] | None:
        """Reads the gate's setting in a word into fields of the configuration, here a width: "mlp:64".

        Args:
            setting: What follows the colon, or None.

        Returns:
            The fields, or None if the gate has no such setting.
        """
        if setting is None:
            return {}
        wide_enough = cls.has_width and re.fullmatch(r"[1-9][0-9]{0,8}", setting) and int(setting) <= WIDEST
        return {"gate_hidden_size": int(setting)} if wide_enough else None

    @classmethod
    def setting(cls, config) -> str | None:
        """Writes what `parsed` reads."""
        return str(config.gate_hidden_size) if cls.has_width else None

    @classmethod
    def check(cls, config) -> None:
        """Rejects a configuration whose specialists the gate cannot weigh.

        Raises:
            ValueError: With the rule, what came, and the way out.
        """

    def scores(self, hidden_states: list[Tensor], *evidence: Tensor) -> Tensor:
        """Scores each specialist before the softmax, then gives the logarithms of the scales, if there are any.

        Args:
            hidden_states: As for `forward`, in float32.
            *evidence: Of a gate that reads the past, what it does. Shape (batch, seq, specialists, numbers).

        Returns:
            Shape (batch, seq, specialists + scales).
        """
        raise NotImplementedError

    def forward(self, hidden_states: list[Tensor], *evidence: Tensor, prior: Tensor | None = None) -> GateOutput:
        """Weighs the specialists at every token.

        Args:
            hidden_states: Each specialist's last hidden state, after its final norm. Shapes (batch, seq, hidden); what a
                head with adapters reads behind it is left out. If the gate runs before the specialists, the token ids
                alone. Shape (batch, seq, 1).
            *evidence: As for `scores`.
            prior: Weights for the whole text, which the gate's are multiplied by before they are made to sum to 1. Shape
                (batch, specialists).

        Raises:
            ValueError: If there is a prior, and weights are signed.
        """
        if prior is not None and self.signed is not None:
            raise ValueError(
                "`gate_prior` multiplies shares that sum to 1, but this model's weights are signed. Leave it out."
            )
        with torch.autocast(device_type=hidden_states[0].device.type, enabled=False):
            states = [h[..., :width] for h, width in zip(hidden_states, self.widths, strict=False)]
            states = [F.dropout(h.float(), self.dropout, self.training) for h in states]
            scores = self.scores(states, *evidence)
            own = scores[..., : self.num_specialists] / self.temperature
            # in logarithms, so that a prior of ones changes no bit, and one for a single specialist leaves it alone
            own = own if prior is None else own + prior.to(own).log()[:, None]
            weights = self.normalised(self._candidates(own))
            if self.num_outputs == self.num_specialists:
                return GateOutput(weights)
            log_scales = scores[..., self.num_specialists :]
            return GateOutput(weights, log_scales.clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp())

    def _candidates(self, scores: Tensor) -> Tensor:
        """Gives a score of minus infinity to the specialists that get no weight."""
        return scores if self.training else self.sparsifier(scores)

    def normalised(self, scores: Tensor) -> Tensor:
        """Turns scores into weights: by a softmax over specialists, or added to signed ones. Shape (batch, seq, specialists)."""
        if self.signed is None:
            return scores.softmax(-1)
        # one by one: a tensor made of them would be copied to the device, which a CUDA graph cannot record
        return torch.stack([scores[..., k] + number for k, number in enumerate(self.signed)], dim=-1)

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
        state, others = self.state_dict(), indices_of_others(index, config)
        for key, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                if axis is not None:
                    state[key] = state[key].index_select(dim, others[axis].to(state[key].device))
        return state

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """Adds one specialist, the last. The scores of the others stay as they are.

        Its score is a bias: an equal share if the others' biases were all they had, or 0 beside signed weights.

        Args:
            name: Name of the new specialist.
            config: The fused model's configuration with the new specialist.

        Returns:
            Tensors of the gate of all specialists.
        """
        new = len(config.specialists) - 1
        state, sizes, others = self.state_dict(), owners(config), indices_of_others(new, config)
        for key, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                if axis is not None:
                    old = state[key]
                    shape = [*old.shape[:dim], len(sizes[axis]), *old.shape[dim + 1 :]]
                    state[key] = old.new_zeros(shape).index_copy(dim, others[axis].to(old.device), old)
            if axes == (OUTPUTS,) and self.signed is None:
                scores = state[key][:new] / config.gate_temperature
                state[key][new] = config.gate_temperature * (scores.logsumexp(0) - math.log(new))
        return state


def run_before_specialists(gate: nn.Module, input_ids: Tensor, **prior: Tensor) -> GateOutput | None:
    """Runs a gate that reads token ids or nothing; returns None for any other. Shape of `input_ids`: (batch, seq)."""
    return None if gate.reads & (Reads.STATES | Reads.PAST) else gate([input_ids[..., None]], **prior)


def empty(*shape: int) -> nn.Parameter:
    """Makes a parameter in float32 that `init_weights` fills."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


def linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies in float32: `model.to(torch.bfloat16)`, DeepSpeed and FSDP cast every parameter, a gate's too."""
    return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())


def owners(config) -> dict[str, list[int | None]]:
    """Returns, for each kind of axis, which specialist each index belongs to: None for a scale that all share."""
    specialists = list(range(len(config.specialists)))
    scales = specialists if fusion_class(config.fusion).scale_for_each else [None]
    return {
        OUTPUTS: specialists + scales if config.gate_calibration else specialists,
        STATES: [k for k, c in enumerate(config.specialists) for _ in range(c.hidden_size)],
        SPECIALISTS: specialists,
    }


def indices_of_others(index: int, config) -> dict[str, Tensor]:
    """Returns, for each kind of axis, the indices that do not belong to one specialist."""
    return {
        axis: torch.tensor([i for i, owner in enumerate(each) if owner != index])
        for axis, each in owners(config).items()
    }
