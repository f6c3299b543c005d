"""The "evidence" gate: the "cross" gate that also reads how well each specialist has predicted the text so far."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import initialization as init

from .gate_base_ultrafuser import OUTPUTS, SPECIALISTS, Evidence, Reads, empty, linear
from .gate_cross_ultrafuser import CrossGate


# decayed sums of log-probabilities: nats behind the best, no further than this, and how many count as one
MOST_BEHIND, UNIT = 30.0, 10.0


class EvidenceGate(CrossGate):
    """An MLP with a linear skip over all hidden states, as "cross" has it, and nine numbers of evidence per specialist.

    scores = W2 relu(W1 h + E1 e + b1) + V h + E e + b2 for h = [h_1, ..., h_N] and e = [e_1, ..., e_N], where e_k holds
    how far specialist k's decayed sums of log-probabilities are behind the best one's, and its log weights in fixed-share
    forecasters.
    """

    reads = Reads.STATES | Reads.PAST
    evidence = Evidence(decays=(0.5, 0.8, 0.9, 0.95, 0.99), switches=(0.2, 0.05, 0.01, 0.002))
    axes = CrossGate.axes | {
        "hidden_evidence_weight": (None, SPECIALISTS, None),
        "skip_evidence_weight": (OUTPUTS, SPECIALISTS, None),
    }

    def __init__(self, config):
        super().__init__(config)
        number, size = self.num_specialists, sum(map(len, self.evidence))
        self.hidden_evidence_weight = empty(config.gate_hidden_size, number, size)
        self.skip_evidence_weight = empty(self.num_outputs, number, size)

    def scores(self, hidden_states: list[Tensor], *evidence: Tensor) -> Tensor:
        states, past = torch.cat(hidden_states, dim=-1), self.features(evidence[0].float()).flatten(-2)
        past = F.dropout(past, self.dropout, self.training)
        hidden = linear(states, self.hidden_weight, self.hidden_bias)
        hidden = (hidden + linear(past, self.hidden_evidence_weight.flatten(1))).relu()
        skipped = linear(states, self.skip_weight) + linear(past, self.skip_evidence_weight.flatten(1))
        return linear(hidden, self.score_weight, self.score_bias) + skipped

    def features(self, evidence: Tensor) -> Tensor:
        """Makes numbers of one size of evidence. Shape (batch, seq, specialists, 9)."""
        sums, log_weights = evidence.tensor_split([len(self.evidence.decays)], dim=-1)
        sums = (sums - sums.amax(-2, keepdim=True)).clamp(min=-MOST_BEHIND) / UNIT
        return torch.cat([sums, log_weights], dim=-1)

    def init_weights(self) -> None:
        super().init_weights()
        size = self.hidden_weight.shape[1] + self.hidden_evidence_weight[0].numel()
        init.normal_(self.hidden_evidence_weight, std=size**-0.5)
