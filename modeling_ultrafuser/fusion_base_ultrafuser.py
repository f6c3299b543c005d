"""Base of all fusion rules: from hidden states, gate weights and heads to one prediction."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.utils import ModelOutput

from .families_ultrafuser import bounded, soft_cap
from .outputs_ultrafuser import UltraFuserMixtureOutput
from .readers_ultrafuser import reader_of, state_widths


class Fusion(nn.Module):
    """Base of all fusion rules: computes the logits of one specialist after another, which `combined` makes one of.

    A rule is one file with one subclass, and one line in `FUSIONS`. It has no parameters. `combined` is all that it must
    define; what can be faster or smaller for a rule is a method or an attribute here that it may override. A configuration
    gives its name, or its name and settings, as in "contrast:0.5,0.1", which `parsed` reads.

    Attributes:
        one_head: Whether the fused logits are one linear layer on one hidden state, which vLLM, TRL's fused head, scores
            of whole texts and modules in place of the head need.
        has_loss: Whether it can be trained and measured by the log-probability of a text. A rule for decoding may forbid
            tokens, or have no gradient.
        needs_all: Whether a specialist counts that has no weight, so that none can be left out while decoding.
        reads_gate: Whether the gate's weights count.
        scale_for_each: Whether a calibrated gate predicts one scale for each specialist, or one for all.
        switch_probability: Default of the "posterior" gate.
        output_class: What the backbone returns.
        format_version: The first format of saved folders that knows the rule.
        settings: What `parsed` returned.
    """

    one_head = False
    has_loss = True
    needs_all = False
    reads_gate = True
    scale_for_each = True
    switch_probability = 0.0005
    output_class: type[ModelOutput] = UltraFuserMixtureOutput
    format_version = 1

    def __init__(self, config):
        super().__init__()
        self.config, self.settings = config, self.parsed(setting_in(config.fusion))

    @classmethod
    def parsed(cls, setting: str | None) -> tuple | None:
        """Reads the rule's settings.

        Args:
            setting: What follows the colon, or None.

        Raises:
            ValueError: If the rule has no such setting.
        """
        if setting is not None:
            raise ValueError(f"This fusion rule has no setting, but got {setting!r:.100}. Leave it out.")

    @classmethod
    def check(cls, config) -> None:
        """Rejects a configuration whose specialists the rule cannot fuse.

        Raises:
            ValueError: With the rule, what came, and the way out.
        """

    @classmethod
    def fused_cap(cls, config) -> float | None:
        """Returns what bounds the fused logits, or None."""

    def factors(self, gate_weights: Tensor, logit_scales: Tensor | None) -> Tensor | None:
        """Returns factors of the hidden states that the head reads, or None. Shape (..., specialists)."""
        return logit_scales

    def forward(self, hidden_states: list[Tensor], gate_weights: Tensor, logit_scales: Tensor | None = None) -> Tensor:
        """Puts the specialists' last hidden states side by side, times their factors.

        Args:
            hidden_states: Each specialist's. Shapes (batch, seq, hidden), or (tokens, hidden).
            gate_weights: Shape (batch, seq, specialists), or (tokens, specialists).
            logit_scales: Shape (batch, seq, 1 or specialists), or without batch.

        Returns:
            Shape (batch, seq, sum of hidden sizes), or the same of tokens.
        """
        return torch.cat(self.scaled(hidden_states, gate_weights, logit_scales), dim=-1)

    def scaled(self, hidden_states: list[Tensor], gate_weights: Tensor, logit_scales: Tensor | None) -> list[Tensor]:
        """Multiplies each specialist's hidden states by its factor."""
        factors = self.factors(gate_weights, logit_scales)
        if factors is None:
            return hidden_states
        factors = factors.to(hidden_states[0].dtype).split(1, dim=-1)
        return [f * h for f, h in zip(factors, hidden_states, strict=True)]

    def logits(self, head: nn.Module, hidden_states: Tensor, gate_weights: Tensor) -> Tensor:
        """Predicts the next token.

        Args:
            head: The wide head.
            hidden_states: As `forward` returns them. Shape (batch, seq, width).
            gate_weights: Shape (batch, seq, specialists).

        Returns:
            Logits or log-probabilities. Shape (batch, seq, vocab).
        """
        return self.logits_of(head.weight, hidden_states, gate_weights).to(hidden_states.dtype)

    def logits_of(self, head: Tensor, hidden_states: Tensor, gate_weights: Tensor) -> Tensor:
        """Predicts the next token from the head's weight. Shape (..., vocab)."""
        parts = specialist_parts(hidden_states, self.config)
        return self.fused((F.linear(own, head[:, columns]) for own, columns, _ in parts), gate_weights)

    def fused(
        self,
        logits: Iterable[Tensor],
        gate_weights: Tensor,
        logit_scales: Tensor | None = None,
        kept: Sequence[int] | None = None,
    ) -> Tensor:
        """Fuses the specialists' logits.

        Args:
            logits: Each specialist's, before its soft cap. Shapes (..., vocab).
            gate_weights: Shape (..., specialists).
            logit_scales: If the logits are not scaled yet. Shape (..., 1 or specialists).
            kept: Indices of the specialists whose logits are given; the others have no weight. Default: all.

        Returns:
            In float32. Shape (..., vocab).
        """
        kept = range(gate_weights.shape[-1]) if kept is None else kept
        scales = self.factors(gate_weights, logit_scales)
        return self.combined(self._bounded(logits, scales, kept), gate_weights[..., list(kept)])

    def _bounded(self, logits: Iterable[Tensor], scales: Tensor | None, kept: Sequence[int]) -> Iterable[Tensor]:
        for k, own in zip(kept, logits, strict=True):
            scaled = own if scales is None else own * scales[..., k, None].to(own.dtype)
            yield bounded(scaled, soft_cap(self.config.specialists[k])).float()

    def combined(self, logits: Iterable[Tensor], gate_weights: Tensor) -> Tensor:
        """Makes one prediction of the specialists'.

        Args:
            logits: Each specialist's in float32, made as they are asked for. Shapes (..., vocab).
            gate_weights: Shape (..., specialists).

        Returns:
            Logits or log-probabilities. Shape (..., vocab).
        """
        raise NotImplementedError


def setting_in(word: str) -> str | None:
    """Returns what follows the colon of a rule's name, or None."""
    _, colon, setting = word.partition(":")
    return setting if colon else None


def specialist_parts(states: Tensor, config) -> Iterator[tuple[Tensor, slice, float | None]]:
    """Yields, for each specialist, its states, its columns of the wide head, and what bounds its logits."""
    own = states.split(state_widths(config), -1)
    yield from zip(own, reader_of(config).head_columns(config), map(soft_cap, config.specialists), strict=True)
