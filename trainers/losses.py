"""What trainers add to the model's own loss: gate terms, and scores of tokens for a mixture of probabilities."""

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


CHUNK = 1024  # positions whose (positions, vocab) probabilities are in memory at once


@dataclass
class TokenScores(ModelOutput):
    """What TRL's trainers read from a forward pass with `fused_lm_head=True`. All shapes (batch, seq - 1).

    Attributes:
        log_probs: Log-probability of each next token, 0 where the label is -100.
        entropy: Entropy of each prediction in nats, without gradient.
        is_top1: Whether the label is the most likely token.
        label_mask: Whether the label is not -100.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None


def add_mixture_head(model: PreTrainedModel) -> None:
    """Lets TRL's trainers train `fusion="probabilities"`, whose loss is no linear head's, in chunks.

    TRL's own head multiplies one hidden state by one matrix, which would mix logits. This one computes
    log sum_k w_k softmax(h_k W_k^T) for `CHUNK` positions at a time, and again in the backward pass.
    """
    original = type(model).forward

    @functools.wraps(original)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return original(self, *args, labels=labels, **extra, **kwargs)
        kwargs["use_cache"] = False
        outputs = self.model(*args, **kwargs)
        targets = labels[:, 1:]
        mask = targets != -100
        states, weights = outputs.specialist_hidden_states[:, :-1][mask], outputs.gate_weights[:, :-1][mask]
        found = [
            checkpoint(_scores_of_chunk, self, *chunk, use_reentrant=False)
            for chunk in zip(states.split(CHUNK), weights.split(CHUNK), targets[mask].split(CHUNK), strict=True)
        ]
        # scattered, so that a batch without labels still gives a zero that has a gradient
        return TokenScores(
            *(
                torch.zeros(mask.shape, dtype=f[0].dtype, device=mask.device).masked_scatter(mask, torch.cat(f))
                for f in zip(*found, strict=True)
            ),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


def _scores_of_chunk(model, states: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = model._log_probabilities(states, weights)
    entropy = torch.special.entr(log_probs.detach().exp()).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy, log_probs.argmax(-1) == targets


def gate_terms(args, weights: Tensor, domain: Tensor, own: list[int | None], last_mean: Tensor, step: int):
    """The optional terms on gate weights, one value per token, to be averaged as the loss is.

    Args:
        args: `gate_entropy`, `gate_balance`, `gate_domain` and `gate_domain_steps` are read.
        weights: Gate weights. Shape (batch, seq, specialists).
        domain: Domain of each token. Shape (batch, seq).
        own: Place of each domain's own specialist. Length: domains.
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
        of_own = torch.tensor(own, device=weights.device)[domain]
        nll = -weights.gather(-1, of_own[..., None])[..., 0].clamp(min=1e-12).log()
        terms = terms + args.gate_domain * (1 - step / args.gate_domain_steps) * nll
    return terms
