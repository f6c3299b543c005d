"""Computes terms that trainers can add to the model's loss: terms on gate weights."""

import torch
from torch import Tensor


def gate_terms(args, weights: Tensor, domain: Tensor, own: list[int | None], last_mean: Tensor, step: int):
    """The optional terms on gate weights, one value per token, to be averaged as the loss is.

    Args:
        args: `gate_entropy`, `gate_balance`, `gate_domain` and `gate_domain_steps` are read.
        weights: Gate weights. Shape (batch, seq, specialists).
        domain: Domain of each token. Shape (batch, seq).
        own: Place of each domain's own specialist. Length: domains; mixed examples, counted behind them, have none.
        last_mean: Mean gate weights over the last optimizer step's whole batch. Shape (specialists,).
        step: Optimizer steps done.

    Returns:
        Shape (batch, seq), or 0.0 if no term is asked for.
    """
    terms = 0.0
    if args.gate_entropy:
        terms = terms + args.gate_entropy * torch.special.entr(weights.clamp(min=1e-12)).sum(-1)
    if args.gate_balance:
        # N sum_k m_k^2 of the mean m over the whole batch, linear in m around the last step's mean: so every
        # micro-batch of every process can be summed up, as if all had been seen together
        number, mean = weights.shape[-1], last_mean.to(weights)
        terms = terms + args.gate_balance * number * (2 * weights @ mean - mean @ mean)
    if args.gate_domain and step < args.gate_domain_steps:
        of_own = torch.tensor([*own, 0], device=weights.device)[domain]
        nll = -weights.gather(-1, of_own[..., None])[..., 0].clamp(min=1e-12).log()
        terms = terms + args.gate_domain * (1 - step / args.gate_domain_steps) * nll * (domain < len(own))
    return terms
