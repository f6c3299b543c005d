"""Factors of the domains' losses, so that no domain's feedback drowns another's."""

import numpy as np
import torch
from torch import Tensor

from .batch_statistics import DomainSums


BOUNDS = (0.25, 4.0)  # the paper's


class Feedback(DomainSums):
    """Sums of the teacher's feedback by domain, and the factors of DN-MOPD (Li et al., 2026, arXiv 2609.35347).

    With r = log p_teacher(y) - log p_student(y) over the trained tokens, a domain's factor is std(r of all domains) /
    std(r of the domain), within a quarter and four, and 1 where one of them is 0. The paper's factors are of the batch
    that they scale, these of the step before: the teacher need not read a batch twice. In its own comparison factors that
    stay as they were in the first batch did as well for two of three sizes.

    Attributes:
        factors: In force. Shape (domains,).
    """

    def __init__(self, domains: int):
        super().__init__(domains, 4)
        self.factors = torch.ones(domains)

    def add(self, domain: Tensor, losses: Tensor, gaps: Tensor) -> None:
        """Adds trained tokens: their domains, divergences and r. Shapes (tokens,)."""
        gaps = gaps.double()
        self.add_rows(domain, torch.stack([torch.ones_like(gaps), losses.detach().double(), gaps, gaps.square()], -1))

    def renew(self, accelerator) -> None:
        """Computes the factors from the tokens since the last call. Every process must call it."""
        self.factors = torch.tensor(factors(self.new("scale", accelerator)), dtype=torch.float32)

    def state_dict(self, accelerator) -> dict:
        """Returns sums and factors."""
        return {**super().state_dict(accelerator), "factors": self.factors.tolist()}

    def load_state_dict(self, state: dict, process: int, processes: int) -> None:
        """Continues from `state_dict()`."""
        super().load_state_dict(state, process, processes)
        self.factors = torch.tensor(state["factors"])


def factors(sums: np.ndarray) -> np.ndarray:
    """Computes the factors from sums of 1, divergence, r and r^2. Shape (domains, 4) to (domains,)."""
    own, pooled = _spread(sums), _spread(sums.sum(0, keepdims=True))
    known = (own > 0) & (pooled > 0)
    return np.where(known, np.clip(pooled / np.where(known, own, 1), *BOUNDS), 1.0)


def _spread(sums: np.ndarray) -> np.ndarray:
    tokens = np.maximum(sums[:, 0], 1)
    variance = sums[:, 3] / tokens - (sums[:, 2] / tokens) ** 2
    return np.sqrt(np.where(sums[:, 0] > 1, np.maximum(variance, 0), 0))
