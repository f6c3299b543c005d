"""The "constant" gate: one learned number per specialist."""

from torch import Tensor

from .gate_base_ultrafuser import OUTPUTS, Gate, Reads, empty


class ConstantGate(Gate):
    """One learned number per specialist, the same at every token: tuned ensemble weights.

    Its scales, too, are the same at every token: tuned temperatures.
    """

    can_calibrate = True
    reads = Reads.NOTHING
    axes = {"logits": (OUTPUTS,)}

    def __init__(self, config):
        super().__init__(config)
        self.logits = empty(self.num_outputs)

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return self.logits.float().expand(*hidden_states[0].shape[:-1], -1)
