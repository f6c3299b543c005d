"""Evidence: how well each specialist has predicted the text so far, for gates that look back.

What a gate knows at a token is that token and all before it, so that the log-probability of each of them, which its
specialists gave it one token earlier, is known, too. The state that is carried from token to token lives in the
key-value cache, as one more layer behind those of the specialists: whatever crops, reorders or repeats the cache does
it to the state.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.cache_utils import Cache

from .configuration_ultrafuser import UltraFuserConfig
from .families_ultrafuser import bounded
from .forecasts_ultrafuser import accumulated
from .fusion_base_ultrafuser import Fusion, specialist_parts
from .gate_base_ultrafuser import Reads
from .inputs_ultrafuser import Tokens, positions_of


# tokens whose logits are in memory at once
CHUNK, CHUNK_ELSEWHERE = 128, 1024
# tokens that are kept to go back to: these last ones, or all that the last pass has read, up to the second
KEPT, MOST_KEPT = 64, 1024
# of the token before the first: nothing comes next after it
NOWHERE = -2


class Past(NamedTuple):
    """State that is carried from token to token. All are (batch, seq, ...).

    Attributes:
        states: The specialists' last hidden states side by side. Shape (..., sum of hidden sizes).
        evidence: See `accumulated`. Shape (..., specialists, numbers).
        positions: Of the tokens in their text, for each view of it. Shape (..., 1 or specialists).
    """

    states: Tensor
    evidence: Tensor
    positions: Tensor


class EvidenceLayer:
    """Evidence as one more layer of a key-value cache.

    It keeps the last tokens only, a few of which the cache can be cropped by.

    Args:
        in_place: Whether tensors stay where they are, as compiled steps want it. There is then no way back.
    """

    # what the library asks of the layers of a cache
    is_compileable = is_croppable = is_initialized = True
    is_sliding = supports_early_init = False
    keys = values = None

    def __init__(self, in_place: bool):
        self.in_place = in_place
        self.past: Past | None = None
        self.length = 0  # tokens that were read, kept or not
        # log-sum-exp of each specialist's logits at the last token, if they have been computed; (batch, 1, specialists)
        self.normalisers: Tensor | None = None
        self.normalised = False

    def normalise(self, normalisers: Tensor) -> None:
        """Takes in the log-sum-exp of each specialist's logits at the last token. Shape (batch, 1, specialists)."""
        if self.in_place and self.normalisers is not None:
            self.normalisers.copy_(normalisers)
        else:
            self.normalisers = normalisers
        self.normalised = True

    def update(self, new: Past) -> None:
        """Takes in what is known at the tokens just read."""
        read, self.normalised = new.states.shape[1], False
        self.length += read
        keep = 1 if self.in_place else max(KEPT, min(read, MOST_KEPT))
        new = Past(*(t[:, -keep:] for t in new))
        if self.in_place and self.past is not None:
            for kept, last in zip(self.past, new, strict=True):
                kept.copy_(last)
        elif self.past is None or read >= keep:
            self.past = Past(*(t.clone() for t in new))
        else:
            self.past = Past(*(torch.cat([a[:, read - keep :], b], 1) for a, b in zip(self.past, new, strict=True)))

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back by some tokens.

        Raises:
            ValueError: If that is further than what is kept.
        """
        remove = -tokens_to_remove
        if not remove or self.past is None:
            return
        kept = self.past.states.shape[1]
        if remove == self.length:
            self.reset()
            return
        if self.in_place or not 0 < remove < kept:
            raise ValueError(
                f"The evidence that a gate reads goes back {0 if self.in_place else kept - 1} tokens here, but the cache "
                f"is to be cropped by {tokens_to_remove}. Read the text anew into a new cache."
            )
        self.past, self.normalised = Past(*(t[:, :-remove] for t in self.past)), False
        self.length -= remove

    def reset(self) -> None:
        """Forgets everything."""
        self.past = self.normalisers = None
        self.normalised, self.length = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gives each row the state of another."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._change(lambda kept: kept[indices.to(kept.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._change(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.past is not None:
            self.past = Past(*map(change, self.past))
        if self.normalisers is not None:
            self.normalisers = change(self.normalisers)

    def get_max_length(self) -> int:
        """No limit, in the library's words."""
        return -1

    def get_seq_length(self) -> int:
        """Tokens that are kept."""
        return 0 if self.past is None else self.past.states.shape[1]

    def offload(self) -> None:
        """Stays where it is."""

    prefetch = offload


def layer_of(cache: Cache) -> EvidenceLayer:
    """A cache's own layer of evidence, behind those of the specialists; made unless it is there.

    Raises:
        ValueError: If the cache moves its layers between devices.
    """
    for layer in reversed(cache.layers):
        if isinstance(layer, EvidenceLayer):
            return layer
    if cache.offloading:
        raise ValueError(
            "An offloaded cache fetches one layer after another, which evidence is none of, but the gate reads it. "
            "Leave `cache_implementation='offloaded'` out, or choose 'static'."
        )
    cache.layers.append(EvidenceLayer(in_place=cache.is_compileable))
    return cache.layers[-1]


@torch.no_grad()
def read_evidence(
    backbone: nn.Module,
    hidden_states: list[Tensor],
    tokens: Tokens,
    past_key_values: Cache | None,
    cu_seq_lens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Computes what a gate reads besides hidden states: nothing, or how well each specialist predicted the text so far.

    Keeps it in the cache. A token counts if its position is the one before it plus 1: not behind padding, and not where
    another text begins. There everything starts anew. Where specialists read the text in words of their own, only those
    tokens count that all of them read; elsewhere their likelihoods do not compare.

    Args:
        backbone: Its gate and configuration are read, and the head that it was given.
        hidden_states: Each specialist's last hidden states at the new tokens. Shapes (batch, seq, hidden).
        tokens: The new tokens. The mask reaches back to the first token of the text.
        past_key_values: As in `UltraFuserModel.forward`.
        cu_seq_lens: Where texts begin that lie end to end in one row. Shape (texts + 1,).

    Returns:
        See `accumulated`. Shape (batch, seq, specialists, numbers).

    Raises:
        ValueError: If the head is not there as a whole.
    """
    if Reads.PAST not in backbone.fusion_gate.reads:
        return ()
    wanted, config = backbone.fusion_gate.evidence, backbone.config
    states = torch.cat(hidden_states, -1).detach()
    weight = _whole_head(backbone.wide_head, config, states)
    layer = None if past_key_values is None else layer_of(past_key_values)
    before = None if layer is None or layer.past is None else Past(*(t[:, -1:] for t in layer.past))
    ids = tokens.input_ids[:, None] if tokens.specialist_input_ids is None else tokens.specialist_input_ids
    positions, follows = _places(ids, tokens, cu_seq_lens, before)
    if layer is not None and layer.normalised and ids.shape[-1] == 1:
        log_probs = logits_of(before.states, ids, weight, config) - layer.normalisers
    else:
        first = torch.zeros_like(states[:, :1]) if before is None else before.states
        log_probs = judged(specialist_parts(torch.cat([first, states[:, :-1]], 1), config), ids, weight)
    counts = follows & (ids == ids[:, :1]).all(1)
    follows, counts = follows.to(states.device), counts.to(states.device)
    evidence = accumulated(log_probs, follows, counts, wanted, None if before is None else before.evidence[:, 0])
    if layer is not None:
        layer.update(Past(states, evidence, positions))
    return (evidence,)


def _places(ids: Tensor, tokens: Tokens, cu_seq_lens: Tensor | None, before: Past | None) -> tuple[Tensor, Tensor]:
    """Returns the new tokens' positions in their texts, and which of them follow the one before.

    Args:
        ids: For all specialists or for each. Shape (batch, 1 or specialists, seq).
        tokens: A mask that is prepared in advance comes with positions. What specialists' own masks tell comes first.
        cu_seq_lens: As for `read_evidence`.
        before: What is known of the token before the first.

    Returns:
        Shapes (batch, seq, 1 or specialists) and (batch, seq).
    """
    (batch, _, seq), device, position_ids = ids.shape, ids.device, tokens.position_ids
    views = tokens.specialist_attention_mask
    mask = tokens.attention_mask if views is None else views
    own = isinstance(mask, Tensor) and mask.ndim == 3
    mask = mask if own or (isinstance(mask, Tensor) and mask.ndim == 2) else None
    counted = torch.arange(seq, device=device)[None, :, None]
    if position_ids is not None and not own:
        positions = position_ids[..., None]
    elif cu_seq_lens is not None:
        text = torch.searchsorted(cu_seq_lens, counted.to(cu_seq_lens.dtype), right=True) - 1
        positions = counted - cu_seq_lens[text]
    elif mask is not None:
        positions = positions_of(mask.reshape(-1, mask.shape[-1]), seq).view(batch, -1, seq).mT
    else:
        positions = counted if before is None else before.positions + 1 + counted
    positions = positions.expand(batch, -1, -1).to(device)
    start = positions.new_full((batch, 1, 1), NOWHERE) if before is None else before.positions
    earlier = torch.cat([start.expand(-1, -1, positions.shape[-1]), positions[:, :-1]], 1)
    follows = (positions == earlier + 1).all(-1)
    if mask is not None and not own:
        real = F.pad(mask.long(), (1, 0)).bool()[:, -seq - 1 :]
        follows = follows & real[:, 1:] & real[:, :-1]
    return positions, follows


def judged(parts: Iterable[tuple[Tensor, slice, float | None]], ids: Tensor, head: Tensor) -> Tensor:
    """Computes the log-probability of each token under each specialist, some tokens at a time.

    Args:
        parts: What `specialist_parts` gives of the last hidden states one token earlier. Shapes (batch, seq, hidden).
        ids: The tokens, for all specialists or for each. Shape (batch, 1 or specialists, seq).
        head: The wide head's weight.

    Returns:
        Shape (batch, seq, specialists).
    """
    size = CHUNK if head.device.type == "cpu" else CHUNK_ELSEWHERE
    found = []
    for k, (own, columns, cap) in enumerate(parts):
        weight, tokens, chunks = head[:, columns], ids[:, min(k, ids.shape[1] - 1)], []
        for h, y in zip(own.flatten(0, 1).split(size), tokens.flatten().split(size), strict=True):
            logits = bounded(F.linear(h.to(weight.device, weight.dtype), weight), cap).float()
            at_y = logits.gather(-1, y.to(weight.device)[:, None])[:, 0]
            chunks.append(at_y - logits.logsumexp(-1))
        found.append(torch.cat(chunks).to(own.device).view(own.shape[:2]))
    return torch.stack(found, -1)


def logits_of(states: Tensor, ids: Tensor, head: Tensor, config: UltraFuserConfig) -> Tensor:
    """Each specialist's logit of one token of each text: see `judged`, with a seq of 1."""
    found = []
    for k, (own, columns, cap) in enumerate(specialist_parts(states, config)):
        row = head[ids[:, min(k, ids.shape[1] - 1), 0].to(head.device)][:, columns]
        logit = torch.bmm(own.to(row.device, row.dtype), row[..., None])[..., 0]
        found.append(bounded(logit, cap).float().to(states.device))
    return torch.stack(found, -1)


def decoding_layer(backbone: nn.Module, cache: Cache | None, logits_to_keep: int | Tensor) -> EvidenceLayer | None:
    """Returns the layer that keeps evidence, in a decoding step with a gate that reads it and a plain head."""
    last = isinstance(logits_to_keep, int) and logits_to_keep == 1
    reads_past = Reads.PAST in backbone.fusion_gate.reads
    if not reads_past or cache is None or not last or torch.is_grad_enabled():
        return None
    return layer_of(cache) if type(backbone.wide_head[0]) is nn.Linear else None


def last_logits(fusion: Fusion, head: Tensor, layer: EvidenceLayer, shares: Tensor, scales: Tensor | None) -> Tensor:
    """Computes the fused logits of the last token, one specialist at a time.

    Keeps the log-sum-exp of each one's logits in `layer`: at the next token `read_evidence` needs it, and then multiplies
    by one row of the head, not by all.

    Args:
        fusion: The fused model's rule.
        head: The wide head's weight.
        layer: The cache's layer of evidence, which has read the token.
        shares: Gate weights. Shape (batch, seq, specialists).
        scales: Of a calibrated gate. Shape (batch, seq, 1 or specialists).

    Returns:
        Shape (batch, 1, vocab).
    """
    shares, scales = (None if t is None else t[:, -1:].to(head.device) for t in (shares, scales))
    states, logits, normalisers = layer.past.states[:, -1:], [], []
    for own, columns, cap in specialist_parts(states.to(head.device), fusion.config):
        logits.append(F.linear(own.to(head.dtype), head[:, columns]))
        normalisers.append(bounded(logits[-1], cap).float().logsumexp(-1))
    layer.normalise(torch.stack(normalisers, -1).to(states.device))
    return fusion.fused(logits, shares, scales).to(states.dtype)


def _whole_head(heads: tuple[nn.Module, ...], config: UltraFuserConfig, states: Tensor) -> Tensor:
    weight = heads[0].weight if heads else None
    if weight is None:
        found = "the backbone alone has none: load the folder with `AutoModelForCausalLM`"
    elif weight.is_meta and not states.is_meta:
        found = "it is on the disk: load the model with the head on a device"
    elif len(weight) != config.vocab_size or hasattr(weight, "full_tensor"):
        found = "each process holds a part of it: train with FSDP2, DDP or one process, or choose another gate"
    else:
        return weight
    raise ValueError(
        f"The gate {config.gate!r} asks how likely every specialist held each token, which takes the whole head, but "
        f"{found}."
    )
