"""Computes terms that trainers can add to the model's loss: terms on gate weights."""

import torch
from torch import Tensor


def gate_terms(
    args,
    weights: Tensor,
    domain: Tensor,
    own: list[int | None],
    last_mean: Tensor,
    step: int,
    *,
    factors: Tensor | None = None,
    best: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor | float:
    """The optional terms on gate weights, one value per token, to be averaged as the loss is.

    Args:
        args: `gate_entropy`, `gate_balance`, `gate_domain`, `gate_domain_steps` and `gate_scale` are read.
        weights: Gate weights. Shape (batch, seq, specialists).
        domain: Domain of each token. Shape (batch, seq).
        own: Place of each domain's own specialist, None where it has none. Length: domains; mixed examples, counted behind
            them, have none.
        last_mean: Mean gate weights, times `factors`, over the last optimizer step's whole batch. Shape (specialists,).
        step: Optimizer steps done.
        factors: See `group_factors`. Default: ones. Shape (domains or one more, specialists).
        best: The specialist that predicts each token best, which `gate_domain` goes by instead. Shape (batch, seq).
        scales: Factors on the logits of a gate with `gate_calibration`. Shape (batch, seq, scales).

    Returns:
        Shape (batch, seq), or 0.0 if no term is asked for.
    """
    terms = 0.0
    if args.gate_entropy:
        terms = terms + args.gate_entropy * torch.special.entr(weights.clamp(min=1e-12)).sum(-1)
    if args.gate_balance:
        terms = terms + args.gate_balance * _balance(weights, domain, last_mean.to(weights), factors)
    if args.gate_domain and step < args.gate_domain_steps:
        places = torch.tensor([-1 if place is None else place for place in [*own, None]], device=weights.device)
        target = places[domain] if best is None else best
        nll = -weights.gather(-1, target.clamp(min=0)[..., None])[..., 0].clamp(min=1e-12).log()
        counts = target >= 0
        terms = terms + args.gate_domain * (1 - step / args.gate_domain_steps) * nll * counts
    if args.gate_scale and scales is not None:
        terms = terms + args.gate_scale * scales.log().square().sum(-1)
    return terms


def _balance(weights: Tensor, domain: Tensor, mean: Tensor, factors: Tensor | None) -> Tensor:
    """N sum_k m_k^2 of the mean m over the whole batch, linear in m around the last step's mean.

    So every micro-batch of every process can be summed up, as if all had been seen together. With factors it is divided by
    (sum_k m_k)^2, which is 1 without them. Shape (batch, seq).
    """
    number = weights.shape[-1]
    if factors is None:
        return number * (2 * weights @ mean - mean @ mean)
    weighed, total, squares = weights * factors.to(weights)[domain], mean.sum(), mean @ mean
    return number * (2 * weighed @ mean - 2 * squares / total * weighed.sum(-1) + squares) / total**2


def group_factors(args, domains: list[str], specialists: list[str]) -> Tensor | None:
    """Computes what `gate_balance` multiplies gate weights by: more in the specialist's own group, less in another.

    LoRAMoE's localized balance (Dou et al., 2024, *LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via
    MoE-Style Plugin*): balanced within a group of specialists, and not between groups. Its code has the coefficient of
    variation of the sums; this is that, plus 1.

    Args:
        args: `gate_groups` and `gate_groups_strength` are read.
        domains: Names of the domains, and of those without a group, such as mixed examples: all factors there are 1.
        specialists: Names of the specialists.

    Returns:
        Shape (domains, specialists), or None without groups.
    """
    if not args.gate_groups:
        return None
    group = {name: title for title, names in args.gate_groups.items() for name in names}
    strength = args.gate_groups_strength
    rows = [[0 if d not in group else 1 if group[d] == group[s] else -1 for s in specialists] for d in domains]
    return 1 + strength * torch.tensor(rows, dtype=torch.float64)
