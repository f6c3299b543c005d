"""Keeps each specialist's log-probability of the label: all that a mixture of probabilities needs."""

import torch
from torch import Tensor

from modeling_ultrafuser.families_ultrafuser import soft_cap

from .chunks import specialist_log_probs
from .head_base import log_of
from .kept_base import Kept


class LogProbsKept(Kept):
    """Keeps one number of each specialist and token. Exact; an epoch costs the gate alone."""

    sees_vocabulary = False

    def fields(self) -> dict[str, tuple]:
        return {"log_probs": ((len(self.config.specialists),), torch.float32)}

    def made(self, states: list[Tensor], heads: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        parts = zip(states, heads, map(soft_cap, self.config.specialists), strict=True)
        return {"log_probs": torch.stack([specialist_log_probs(h, w, targets, cap) for h, w, cap in parts], -1)}

    def score(self, head, weight, kept, states, weights, scales, targets):
        return blind((log_of(weights) + kept["log_probs"]).logsumexp(-1))


def blind(log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores without what only the whole vocabulary could tell."""
    return log_probs, torch.zeros_like(log_probs), torch.zeros_like(log_probs, dtype=torch.bool)
