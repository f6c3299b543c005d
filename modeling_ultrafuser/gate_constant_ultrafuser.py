"""The "constant" gate: one learned number per specialist."""

from torch import Tensor

from .gate_base_ultrafuser import Gate, Reads, empty, rows_of_others, with_equal_share


class ConstantGate(Gate):
    """One learned number per specialist, the same at every token: tuned ensemble weights.

    Its scales, too, are the same at every token: tuned temperatures.
    """

    can_calibrate = True
    reads = Reads.NOTHING

    def __init__(self, config):
        super().__init__(config)
        self.logits = empty(self.num_outputs)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return self.logits.float().expand(*hidden_states[0].shape[:-1], -1)

    def without(self, index: int, config) -> dict[str, Tensor]:
        return {"logits": self.logits.detach()[rows_of_others(index, config)]}

    def with_one_more(self, name: str, config) -> dict[str, Tensor]:
        """The new specialist starts with an equal share."""
        return {"logits": with_equal_share(self.logits.detach(), config)}
