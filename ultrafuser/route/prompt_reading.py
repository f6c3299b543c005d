"""Prompts, and what specialists make of them: read when a router asks for it, and not read again by the answer."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.evidence_ultrafuser import read_evidence
from modeling_ultrafuser.fusion_base_ultrafuser import specialist_parts
from modeling_ultrafuser.gate_base_ultrafuser import run_before_specialists
from modeling_ultrafuser.inputs_ultrafuser import Tokens, positions_of
from trainers.heads import head_of
from trainers.heads.chunks import specialist_log_probs


class Prompts:
    """A batch of prompts.

    All tokens but the last are read, once, and the cache is left for the answer: the last one is its first input.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        input_ids: Token ids, padded on the left. Shape (batch, seq).
        attention_mask: 1 for tokens, 0 for padding. Default: no padding. Shape (batch, seq).
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ):
        self.model, self.tokenizer, self.input_ids = model, tokenizer, input_ids
        self.attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.cache: Cache | None = None
        self._evidence: tuple[Tensor, ...] = ()

    @cached_property
    def texts(self) -> list[str]:
        """Returns the prompts as text."""
        return texts_of(self.tokenizer, self.input_ids, self.attention_mask)

    @cached_property
    @torch.no_grad()
    def states(self) -> list[Tensor]:
        """Returns each specialist's last hidden states at all tokens but the last. Shapes (batch, seq - 1, hidden)."""
        tokens, backbone = self._tokens(), self.model.model
        cache = backbone.shared_cache(None)
        outputs = backbone.reader.read(tokens, cache, use_cache=True)
        states = [o.last_hidden_state.to(self.model.lm_head.weight.device) for o in outputs]
        # which a gate that looks back goes on from
        self._evidence = read_evidence(backbone, states, tokens, cache)
        self.cache = cache
        return states

    @cached_property
    def losses(self) -> Tensor:
        """Returns each specialist's mean loss on the tokens behind the first, in nats. Shape (batch, specialists)."""
        mask = self._mask
        if not self._readable:
            return torch.zeros(len(mask), len(self.model.config.specialists))
        targets, head = self.input_ids[:, 1:], self.model.lm_head.weight
        parts = specialist_parts(torch.cat(self.states, -1), self.model.config)
        found = [
            specialist_log_probs(own.flatten(0, 1), head[:, columns], targets.flatten().to(head.device), cap)
            for own, columns, cap in parts
        ]
        losses = -torch.stack(found, -1).unflatten(0, targets.shape).float().cpu()
        return masked_mean(losses, mask.cpu())

    def fused_losses(self, prior: Tensor) -> Tensor:
        """Returns the fused model's mean loss on the tokens behind the first, in nats, which the prior has a gradient from.

        Specialists do not run again, but gate and heads do.

        Args:
            prior: Weights of the specialists. Shape (batch, specialists).

        Returns:
            Shape (batch,).
        """
        if not self._readable:
            return 0 * prior.sum(-1)
        backbone, weight, score = self.model.model, self.model.lm_head.weight.detach(), head_of(self.model.config)
        prior = prior.to(weight.device)
        early = run_before_specialists(backbone.fusion_gate, self.input_ids[:, :-1], prior=prior)
        states, found = backbone.weighed(self.states, *self._evidence, gate_output=early, prior=prior)
        mask = self._mask.bool().to(weight.device)
        targets = self.input_ids[:, 1:].to(weight.device)[mask]
        factors = score.factors(found.weights, found.scales)[mask]
        log_probs, *_ = score.score(states[mask], factors, weight, targets, gate_only=True)
        losses = torch.zeros(mask.shape, device=weight.device).masked_scatter(mask, -log_probs.float())
        return masked_mean(losses[..., None], mask)[:, 0].cpu()

    @property
    def _mask(self) -> Tensor:
        """Returns which tokens follow another one of their prompt. Shape (batch, seq - 1)."""
        return self.attention_mask[:, 1:] * self.attention_mask[:, :-1]

    def mean_states(self, specialists: int | None = None) -> Tensor:
        """Returns the mean of the hidden states over the prompt, specialists side by side. Shape (batch, sum of hidden sizes).

        Args:
            specialists: How many of them are asked, the first ones. Default: all.
        """
        configs = self.model.config.specialists[:specialists]
        mask = self.attention_mask[:, :-1].cpu()
        if not self._readable:
            return torch.zeros(len(mask), sum(c.hidden_size for c in configs))
        states = [h[..., : c.hidden_size] for h, c in zip(self._first(len(configs)), configs, strict=False)]
        return torch.cat([masked_mean(h.float().cpu(), mask) for h in states], -1)

    @torch.no_grad()
    def _first(self, number: int) -> list[Tensor]:
        """Returns hidden states of the first specialists, and runs no others where they can do without them."""
        if number == len(self.model.config.specialists) or not self.model.model.reader_class.one_by_one:
            return self.states
        tokens, reader = self._tokens(), self.model.model.reader
        inputs = {"input_ids": tokens.input_ids, "position_ids": tokens.position_ids, "return_dict": True}
        asked = (reader.one(k) for k in range(number))
        return [
            one(**inputs, attention_mask=tokens.attention_mask, use_cache=False).last_hidden_state for one in asked
        ]

    @property
    def _readable(self) -> bool:
        return self.input_ids.shape[1] > 1

    def _tokens(self) -> Tokens:
        ids, mask = self.input_ids[:, :-1], self.attention_mask[:, :-1]
        positions = positions_of(mask, ids.shape[1])
        return Tokens(ids, None if mask.all() else mask, positions)


def texts_of(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, mask: Tensor) -> list[str]:
    """Decodes the tokens under a mask. Shapes (batch, seq)."""
    return [tokenizer.decode(ids[kept.bool()]) for ids, kept in zip(input_ids, mask, strict=True)]


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads token ids on the left. Returns them and their mask, each (rows, seq)."""
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Averages over tokens, of those under a mask. Shapes (batch, seq, size) and (batch, seq) to (batch, size)."""
    mask = mask.to(values)[..., None]
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
