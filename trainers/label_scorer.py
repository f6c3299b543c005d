"""Scores labels in a fused model's forward pass: what TRL's trainers call, in place of their own head where that is wrong.

Whatever wraps a model, DDP, FSDP or DeepSpeed, has to be called for its loss, so that the model's `forward` is replaced,
once, here.
"""

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .heads import head_of
from .heads.head_base import TokenScores, scattered


class LabelScorer:
    """Replaces a fused model's forward pass while a trainer has it, after TRL's own head is on the model.

    TRL's head multiplies one hidden state by one matrix: for most fusion rules that is the wrong loss. Where it is right it
    stays on GPUs, for which it is written, and where ZeRO-3 or tensor parallelism hold the head in parts.

    Args:
        fused: The fused model, not wrapped.

    Attributes:
        from_cache: Scores labels of tokens in a gate's cache, which a batch gives as `cached`.
    """

    from_cache: Callable[[Tensor, Tensor], TokenScores] | None = None

    def __init__(self, fused: PreTrainedModel):
        self.theirs, self.head = fused.forward, head_of(fused.config)

        # `generate` asks what it takes
        @functools.wraps(type(fused).forward)
        def forward(model, *args, fused_lm_head=False, labels=None, cached=None, **kwargs):
            if cached is not None:
                return self.from_cache(cached, labels)
            if fused_lm_head and not self._is_for_trl(model.get_output_embeddings()):
                return self.scores(model, labels, *args, **kwargs)
            return self.theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)

        fused.forward = types.MethodType(forward, fused)

    def _is_for_trl(self, head: torch.nn.Module) -> bool:
        if not self.head.rule.one_head:
            return False
        # FSDP2 makes the head whole when the backbone has run: see `compat.keep_head_whole`
        in_parts = isinstance(head.weight, DTensor) and not hasattr(head, "unshard")
        return head.weight.device.type != "cpu" or hasattr(head.weight, "ds_id") or in_parts

    def scores(self, model: PreTrainedModel, labels: Tensor, *args, **kwargs) -> TokenScores:
        """Runs the backbone and scores labels by the fusion rule's head. Shape of `labels`: (batch, seq)."""
        kwargs.pop("num_items_in_batch", None)
        outputs = model.model(*args, **kwargs | {"use_cache": False, "return_dict": True})
        head = model.get_output_embeddings().weight
        targets = labels[:, 1:].to(head.device)
        mask = targets != -100
        learns = [head, *model.model.specialists.parameters()]
        factors = self.head.factors(outputs.gate_weights, outputs.logit_scales)
        states, factors = (t[:, :-1].to(head.device)[mask] for t in (outputs[0], factors))
        gate_only = not any(p.requires_grad for p in learns)
        return scattered(mask, *self.head.score(states, factors, head, targets[mask], gate_only=gate_only))
