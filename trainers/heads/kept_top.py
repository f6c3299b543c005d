"""Keeps the likeliest tokens and a polynomial for the others: a mixture of logits at little more than the gate's cost."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser.families_ultrafuser import soft_cap

from .chunks import chunk_size
from .kept_base import Kept
from .kept_log_probs import blind
from .top_tokens import TOP, mixed_log_probs, summarised, terms


class TopKept(Kept):
    """Keeps the likeliest tokens of each specialist, and a polynomial for the others: see `top_tokens`."""

    sees_vocabulary = False

    def check(self) -> None:
        if soft_cap(self.config) is not None:
            raise ValueError("keep='top' sums logits that are not bounded once mixed. Use keep='hidden'.")

    def fields(self) -> dict[str, tuple]:
        number = len(self.config.specialists)
        return {
            "log_probs": ((number,), torch.float32),
            "top": ((number * min(TOP, self.config.vocab_size), number), torch.float32),
            "tail": ((terms(number),), torch.float32),
        }

    def made(self, states: list[Tensor], heads: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        rows = torch.arange(len(targets), device=targets.device).split(chunk_size(targets))
        parts = [_summary([h[r] for h in states], heads, targets[r]) for r in rows]
        return dict(zip(self.fields(), map(torch.cat, zip(*parts, strict=True)), strict=True))

    def score(self, head, weight, kept, states, weights, scales, targets):
        return blind(mixed_log_probs(weights, *(kept[name] for name in self.fields())))


def _summary(states: list[Tensor], heads: list[Tensor], targets: Tensor) -> tuple[Tensor, ...]:
    """Labels' log-probabilities, likeliest tokens, and the polynomial."""
    words = [F.linear(h, w.to(h.dtype)).float().log_softmax(-1) for h, w in zip(states, heads, strict=True)]
    words = torch.stack(words, 1)
    own = words.gather(-1, targets[:, None, None].expand(-1, len(heads), 1))[..., 0]
    return own, *summarised(words)
