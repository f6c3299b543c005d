"""The "dynamic" rule: as much of what tuning changed in small models as moves a large one alike."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .fusion_base_ultrafuser import Fusion
from .refusals_ultrafuser import Refusal
from .sparsifiers_ultrafuser import NONE


# factors of a shift that are tried: 0, 0.1, ..., 2
STEPS, STEP = 20, 0.1
# of one factor each, with several tuned models
CHANGES = 10


class DynamicSettings(NamedTuple):
    """Roles of dynamic; all other specialists are tuned ones.

    Attributes:
        large: Name of the large model.
        base: Name of the small one that they were tuned from.
    """

    large: str
    base: str


class DynamicFusion(Fusion):
    """Adds to a large model what tuning changed in small ones, at each token the amounts that move both equally far.

    Dynamic logit fusion (Fan et al., 2024, arXiv 2406.15480). With P = softmax(z_large), Q = softmax(z_base), Q_t =
    softmax(z_t) of each tuned model, D_t = z_t - z_base and P_x = softmax(z_large + sum_t x_t D_t) it predicts by P_x, where
    all x_t in 0, 0.1, ..., 2 together make

        sum_t (KL(P_x|P) - KL(Q_t|Q))^2 + (KL(P|P_x) - KL(Q|Q_t))^2

    least. All combinations would be 21^T, so all x_t begin at 0 and the one change of one factor that lowers the sum most is
    made, until none does. Of one tuned model this is the least of all; of several it need not be. The sum depends on the
    targets' means alone, so that it tells how far to go, and little about which way.

    Divergences follow from S = sum_t x_t D_t and psi = log E_P exp(S):

        KL(P_x|P) = E_{P_x} S - psi,    KL(P|P_x) = psi - E_P S

    A configuration says which is which: "dynamic:LARGE,BASE". The gate plays no part. For decoding: what is the best x is no
    function with a gradient.
    """

    has_loss = False
    needs_all = True
    reads_gate = False
    format_version = 2

    def __init__(self, config):
        super().__init__(config)
        self.check(config)

    @classmethod
    def parsed(cls, setting: str | None) -> DynamicSettings:
        names = (setting or "").split(",")
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            raise ValueError(
                f"dynamic takes the name of the large model and that of the small one before tuning, as in "
                f"dynamic:large,base. But got {setting!r:.100}."
            )
        return DynamicSettings(*names)

    @classmethod
    def check(cls, config) -> None:
        """Rejects specialists that are not the large model, tuned ones and their base, and a gate that would do nothing."""
        names, roles = config.specialist_names, cls.parsed(config.fusion.partition(":")[2])
        if len(names) < 3 or not set(roles) <= set(names):
            raise Refusal(
                f"`fusion` is {config.fusion!r} and the specialists are {names}",
                "Dynamic fusion is of a large model, small ones that were tuned, and the small one before",
                "Fuse these, three or more, and name the large model and the base: dynamic:large,base.",
                about="fusion",
            )
        if (config.gate, config.gate_sparsifier) != ("uniform", NONE):
            raise Refusal(
                f"`fusion` is {config.fusion!r}, `gate` is {config.gate!r} and `gate_sparsifier` is {config.gate_sparsifier!r}",
                "Dynamic fusion finds its own weights, so that the gate's would have no effect",
                "Choose gate='uniform' without a sparsifier.",
                about="gate",
            )

    def combined(self, logits: Iterable[Tensor], gate_weights: Tensor) -> Tensor:
        """Returns log-probabilities. Shape (..., vocab)."""
        by_name = dict(zip(self.config.specialist_names, (own.log_softmax(-1) for own in logits), strict=True))
        large, base = by_name.pop(self.settings.large), by_name.pop(self.settings.base)
        tuned = list(by_name.values())
        away = torch.stack([_divergence(own, base) for own in tuned])
        back = torch.stack([_divergence(base, own) for own in tuned])
        shifts = [own - base for own in tuned]
        return moved(large, shifts, factors(large, shifts, away, back)).log_softmax(-1)


def moved(large: Tensor, shifts: list[Tensor], found: Tensor) -> Tensor:
    """Adds shifts times their factors. Shapes (..., vocab), factors (tuned models, ...)."""
    for x, shift in zip(found, shifts, strict=True):
        large = large + x[..., None] * shift
    return large


def factors(large: Tensor, shifts: list[Tensor], away: Tensor, back: Tensor) -> Tensor:
    """Finds how much of some shifts moves a distribution as far as others were moved.

    Args:
        large: Log-probabilities of P. Shape (..., vocab).
        shifts: Each D_t. Shapes (..., vocab).
        away: KL of each other distribution, moved, from where it was. Shape (tuned models, ...).
        back: KL of where it was from each that was moved. Shape (tuned models, ...).

    Returns:
        x. Shape (tuned models, ...).
    """
    if len(shifts) == 1:
        return closest(large, torch.zeros_like(large), shifts[0], away, back)[1][None]
    vocab = large.shape[-1]
    found = torch.zeros_like(away).reshape(len(shifts), -1)
    least = torch.full_like(found[0], torch.inf)
    flat = [t.reshape(-1, vocab) for t in (large, *shifts)] + [t.reshape(found.shape).T for t in (away, back)]
    # tokens at which the last change helped
    still = torch.arange(len(least), device=least.device)
    for _ in range(CHANGES):
        start, *own, own_away, own_back = (tensor[still] for tensor in flat)
        x, tried = found[:, still], []
        for k, shift in enumerate(own):
            rest = moved(torch.zeros_like(start), own[:k] + own[k + 1 :], torch.cat([x[:k], x[k + 1 :]]))
            tried.append(closest(start, rest, shift, own_away.T, own_back.T))
        distances, values = (torch.stack(parts) for parts in zip(*tried, strict=True))
        best = distances.argmin(0, keepdim=True)
        distance = distances.gather(0, best)[0]
        better = distance < least[still]
        still, best = still[better], best[:, better]
        if not len(still):
            break
        found[best[0], still] = values[:, better].gather(0, best)[0]
        least[still] = distance[better]
    return found.reshape(away.shape)


def closest(large: Tensor, rest: Tensor, shift: Tensor, away: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Tries all factors of one shift, the others' being as they are.

    Args:
        large: Log-probabilities of P. Shape (..., vocab).
        rest: The other shifts times their factors, summed. Shape (..., vocab).
        shift: D_t. Shape (..., vocab).
        away: As in `factors`.
        back: As in `factors`.

    Returns:
        The least sum of squared differences, and the smallest x that has it. Shapes (...,).
    """
    start = large.exp()
    mean, rest_mean = (start * shift).sum(-1), (start * rest).sum(-1)
    least, found = torch.full_like(mean, torch.inf), torch.zeros_like(mean)
    for i in range(STEPS + 1):
        x = i * STEP
        logits = large + rest + x * shift
        psi = logits.logsumexp(-1)
        shares = (logits - psi[..., None]).exp()
        away_here = x * (shares * shift).sum(-1) + (shares * rest).sum(-1) - psi
        back_here = psi - x * mean - rest_mean
        distance = ((away_here - away) ** 2 + (back_here - back) ** 2).sum(0)
        found = found.masked_fill(distance < least, x)
        least = torch.minimum(least, distance)
    return least, found


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)
