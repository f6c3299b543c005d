"""Base of what a gate's cache keeps of each token, besides its label and what the gate reads."""

from torch import Tensor

from modeling_ultrafuser.readers_ultrafuser import state_widths


class Kept:
    """Keeps nothing more: the hidden states, which the gate reads, are multiplied by the head again. Exact for all rules.

    Args:
        config: The fused model's.

    Attributes:
        sees_vocabulary: Whether entropy and accuracy can be told.
    """

    sees_vocabulary = True

    def __init__(self, config):
        self.config = config

    def check(self) -> None:
        """Rejects a model for which this does not do.

        Raises:
            ValueError: With the way out.
        """

    def fields(self) -> dict[str, tuple]:
        """Returns shape per token and type of each file, by name."""
        return {}

    def made(self, states: list[Tensor], heads: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Computes what is kept of some tokens, by name.

        Args:
            states: Each specialist's last hidden states. Shapes (tokens, hidden).
            heads: Each specialist's columns of the wide head's weight. Shapes (vocab, hidden).
            targets: Labels. Shape (tokens,).
        """
        return {}

    def score(self, head, weight: Tensor, kept: dict, states: Tensor, weights: Tensor, scales: Tensor | None, targets):
        """Scores labels.

        Args:
            head: The fused model's `Head`.
            weight: The wide head's weight.
            kept: As `made` returned them.
            states: The specialists' last hidden states side by side. Shape (tokens, sum of hidden sizes).
            weights: Gate weights. Shape (tokens, specialists).
            scales: Of a calibrated gate. Shape (tokens, 1 or specialists).
            targets: Labels. Shape (tokens,).

        Returns:
            As `Head.score`.
        """
        own = states.split(state_widths(self.config), -1)
        mixed = head.rule(own, weights, scales)
        return head.score(mixed, head.factors(weights, scales), weight, targets, gate_only=True)
