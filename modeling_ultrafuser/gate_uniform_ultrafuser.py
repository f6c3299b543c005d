"""The "uniform" gate: equal weights."""

from torch import Tensor

from .gate_base_ultrafuser import Gate, Reads


class UniformGate(Gate):
    """Equal weights and no parameters: the plain ensemble, and the baseline to beat."""

    reads = Reads.NOTHING

    def scores(self, hidden_states: list[Tensor]) -> Tensor:
        return hidden_states[0].new_zeros(*hidden_states[0].shape[:-1], self.num_specialists)
