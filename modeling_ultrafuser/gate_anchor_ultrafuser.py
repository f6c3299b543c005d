"""The "anchor" gate: one linear layer over the hidden state of one specialist."""

from typing import Any

from torch import Tensor

from .gate_base_ultrafuser import OUTPUTS, empty, linear
from .gate_linear_ultrafuser import LinearGate
from .refusals_ultrafuser import Refusal


class AnchorGate(LinearGate):
    """One linear layer over the hidden state of one specialist, the anchor, which is named: "anchor:text".

    scores = W h_a + b for the anchor a, as a mixture of experts routes from a state that its experts share (Shazeer et al.,
    2017, arXiv 1701.06538, equation 3, without noise). It is the "linear" gate whose columns for all other states are 0.
    """

    axes = {"weight": (OUTPUTS, None), "bias": (OUTPUTS,)}
    format_version = 2

    def __init__(self, config):
        # its configuration may have been checked with another gate
        self.check(config)
        super().__init__(config)
        self.anchor = config.specialist_names.index(config.gate_anchor)
        self.weight = empty(self.num_outputs, self.widths[self.anchor])

    @classmethod
    def parsed(cls, setting: str | None) -> dict[str, Any] | None:
        return {"gate_anchor": setting} if setting else None

    @classmethod
    def setting(cls, config) -> str:
        return config.gate_anchor

    @classmethod
    def check(cls, config) -> None:
        """Rejects an anchor that is none of the specialists."""
        if config.gate_anchor not in config.specialist_names:
            raise Refusal(
                f"`gate` is 'anchor', and there is no specialist {config.gate_anchor!r:.100}",
                "This gate reads the hidden state of one of the specialists",
                f"Name one of {config.specialist_names}, as in anchor:{config.specialist_names[0]}.",
                about="gate",
            )

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return linear(hidden_states[self.anchor], self.weight, self.bias)

    def without(self, index: int, config) -> dict[str, Tensor]:
        if index == self.anchor:
            raise Refusal(
                f"{config.gate_anchor!r} is the specialist whose hidden state the gate reads",
                "Without it an anchor gate has nothing to score the others from",
                "Keep it, or fuse the others anew, with another gate.",
                about="gate",
            )
        return super().without(index, config)
