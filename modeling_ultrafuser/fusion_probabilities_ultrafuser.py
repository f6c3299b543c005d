"""The "probabilities" rule: a mixture of the specialists' distributions."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .fusion_base_ultrafuser import Fusion


class ProbabilitiesFusion(Fusion):
    """Mixes distributions: the classical mixture, in transformers only.

    log p = log sum_k w_k softmax(h_k W_k^T).
    """

    def combined(self, logits: Iterable[Tensor], gate_weights: Tensor) -> Tensor:
        """Returns log-probabilities. Shape (..., vocab)."""
        fused = None
        # a weight that rounds to 0 has a logarithm without a gradient
        log_weights = gate_weights.clamp(min=torch.finfo(gate_weights.dtype).tiny).log()
        for k, own in enumerate(logits):
            part = own.log_softmax(-1) + log_weights[..., k, None]
            fused = part if fused is None else torch.logaddexp(fused, part)
        return fused
