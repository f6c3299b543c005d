"""Base of the losses of all fusion rules: log-probabilities of labels, a few positions at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from modeling_ultrafuser.fusions_ultrafuser import fusion_class

from .chunks import chunk_size, slices
from .kept_base import Kept


@dataclass
class TokenScores(ModelOutput):
    """Scores that TRL's trainers read from a forward pass with `fused_lm_head=True`. All shapes (batch, seq - 1).

    Attributes:
        log_probs: Log-probability of each next token, 0 where the label is -100.
        entropy: Entropy of each prediction in nats, without gradient.
        is_top1: Whether no token is more likely than the label.
        label_mask: Whether the label is not -100.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None


def scattered(mask: Tensor, log_probs: Tensor, entropy: Tensor, is_top1: Tensor) -> TokenScores:
    """Scores of supervised tokens at their places. A batch without labels still gives a zero that has a gradient."""
    places = (f.new_zeros(mask.shape).masked_scatter(mask, f) for f in (log_probs, entropy, is_top1))
    return TokenScores(*places, label_mask=mask)


def log_of(gate_weights: Tensor) -> Tensor:
    """Logarithms of weights. One that rounds to 0 would have a logarithm without a gradient."""
    return gate_weights.clamp(min=torch.finfo(gate_weights.dtype).tiny).log()


class Head:
    """Scores labels under any fusion rule, from full logits of a few positions, which the backward pass computes again.

    A rule whose loss can be faster or smaller has a file with a subclass, and a line in `HEADS`.

    Args:
        config: The fused model's.

    Attributes:
        kept: What a gate's cache can keep, by name, the default first.
    """

    kept: dict[str, type[Kept]] = {"hidden": Kept}

    def __init__(self, config):
        self.config, self.rule = config, fusion_class(config.fusion)(config)

    def kinds(self) -> dict[str, type[Kept]]:
        """Lists what a gate's cache can keep: temperatures and signed weights are learned from whole logits."""
        whole = self.config.gate_calibration or self.config.signed_weights is not None
        return {"hidden": Kept} if whole else self.kept

    def factors(self, gate_weights: Tensor, logit_scales: Tensor | None) -> Tensor:
        """Returns what `score` reads of a gate's output. Shape (..., specialists)."""
        return gate_weights

    def score(
        self,
        states: Tensor,
        gate_weights: Tensor,
        head: Tensor,
        targets: Tensor,
        *,
        gate_only: bool = False,
        chunk: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Scores labels.

        Gradients reach states, gate weights and head through the log-probabilities.

        Args:
            states: What the backbone returns first. Shape (tokens, width).
            gate_weights: As `factors` returns them. Shape (tokens, specialists).
            head: The wide head's weight. Shape (vocab, sum of hidden sizes); (vocab, hidden) of adapters of one base.
            targets: Labels. Shape (tokens,).
            gate_only: Whether nothing but the gate learns.
            chunk: Positions at once.

        Returns:
            Log-probabilities of the labels, entropies of the predictions in nats, and whether no token is more likely;
            the last two without gradient. Shapes (tokens,).
        """
        rows = slices(len(targets), chunk or chunk_size(states)) or [slice(0, 0)]
        inputs = ((states[r], gate_weights[r], head, targets[r]) for r in rows)
        return tuple(
            map(torch.cat, zip(*(checkpoint(self._scored, *i, use_reentrant=False) for i in inputs), strict=True))
        )

    def _scored(self, states: Tensor, gate_weights: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        log_probs = self.rule.logits_of(head, states, gate_weights).log_softmax(-1)
        at_labels = log_probs.gather(-1, targets[:, None])[:, 0]
        seen = log_probs.detach()
        return at_labels, torch.special.entr(seen.exp()).sum(-1), at_labels.detach() >= seen.amax(-1)
