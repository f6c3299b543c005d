"""Outputs of the backbone and the causal language model."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .compat_ultrafuser import CACHE


@dataclass
class UltraFuserModelOutput(BaseModelOutputWithPast):
    """Output of the backbone.

    Attributes:
        last_hidden_state: The specialists' last hidden states side by side, scaled by the gate: times the head, they
            are the fused logits. Shape (batch, seq, sum of hidden sizes).
        past_key_values: One cache for all specialists. From transformers 5.24 on its name is `cache`.
        hidden_states: On request, every specialist's hidden states, one specialist after another; and at the end those
            that the head reads, as wide as `config.hidden_size`.
        attentions: On request, every specialist's attention weights, one specialist after another.
        gate_weights: Share of each specialist in each token, in float32. Shape (batch, seq, specialists).
        logit_scales: Factors of a calibrated gate on the logits, see `GateOutput`.
    """

    gate_weights: Tensor | None = None
    logit_scales: Tensor | None = None


@dataclass
class UltraFuserMixtureOutput(ModelOutput):
    """Output of the backbone with a fusion rule that has no wide head, such as fusion="probabilities".

    It has no `last_hidden_state`. Trainers and serving engines multiply that by the head to save memory, which would
    mix logits here, and nothing would show it.

    Attributes:
        specialist_hidden_states: The specialists' last hidden states side by side, scaled by a
            calibrated gate. Shape (batch, seq, sum of hidden sizes).
        past_key_values: One cache for all specialists. From transformers 5.24 on its name is `cache`.
        hidden_states: On request, every specialist's hidden states, one specialist after another; and at the end those
            that the head reads, as wide as `config.hidden_size`.
        attentions: On request, every specialist's attention weights, one specialist after another.
        gate_weights: Share of each specialist in each token, in float32. Shape (batch, seq, specialists).
        logit_scales: Factors of a calibrated gate on the logits, see `GateOutput`.
    """

    specialist_hidden_states: Tensor | None = None
    if CACHE == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    gate_weights: Tensor | None = None
    logit_scales: Tensor | None = None

    @property
    def last_hidden_state(self) -> Tensor:
        """Refused: no hidden state times the head gives a mixture of probabilities."""
        raise AttributeError(
            "With this fusion rule no single hidden state times the head gives the model's prediction, so its "
            "backbone has no `last_hidden_state`, which TRL's trainers need. Train with fusion='logits', or with a "
            "trainer that calls the model's own loss, `model(input_ids, labels=labels).loss`, as transformers' "
            "`Trainer` does. For the hidden states themselves read `specialist_hidden_states`."
        )


@dataclass
class UltraFuserCausalLMOutput(CausalLMOutputWithPast):
    """Output of the causal language model.

    Attributes:
        loss: Negative log-likelihood in nats per labelled token, if `labels` were given. A scalar.
        logits: Fused next-token logits; with fusion="probabilities", log-probabilities. Shape (batch, seq, vocab).
        past_key_values: One cache for all specialists. From transformers 5.24 on its name is `cache`.
        hidden_states: On request, every specialist's hidden states, one specialist after another; and at the end those
            that the head reads, as wide as `config.hidden_size`.
        attentions: On request, every specialist's attention weights, one specialist after another.
        gate_weights: Share of each specialist in each token, in float32. Shape (batch, seq, specialists).
        logit_scales: Factors of a calibrated gate on the logits, see `GateOutput`.
    """

    gate_weights: Tensor | None = None
    logit_scales: Tensor | None = None


def end_to_end(outputs: list[ModelOutput], field: str, *last: Tensor) -> tuple[Tensor, ...] | None:
    """A field of all specialists' outputs, one after another, and `last`; or None if one lacks it."""
    values = [o.get(field) for o in outputs]
    return None if any(v is None for v in values) else (*(t for v in values for t in v), *last)


def selected(states: tuple[Tensor, ...] | None, positions: bool | int | list[int] | None) -> tuple | None:
    """Keeps the states at these positions, counted over all specialists, as the library does for one model."""
    if states is None or positions is None or isinstance(positions, bool):
        return states
    positions = [positions] if isinstance(positions, int) else positions
    kept = {i % len(states) for i in positions if -len(states) <= i < len(states)}
    return tuple(state if i in kept else None for i, state in enumerate(states))
