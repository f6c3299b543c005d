"""Evidence where an engine keeps keys and values of every token and nothing else: vLLM.

A gate that reads the past needs, at every token, what was known at the one before. A layer of attention hands that on. Its
keys are positions in binary digits, each 1 or -1; its queries are those of the position before, times `SHARPNESS`; its
values are what a token leaves to the next. The one key that agrees in all digits is ahead of every other by twice
`SHARPNESS` at least, so that the softmax gives it 1 and all others 0, and its value arrives bit by bit as it was left, in
16 bits, too. Values are cached, shared and freed like those of any layer with a window of two tokens.
"""

import math
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.module import register_module_module_registration_hook

from .compat_ultrafuser import CarrierLayer, cache_dtypes
from .configuration_ultrafuser import UltraFuserConfig
from .evidence_ultrafuser import judged
from .families_ultrafuser import heads_of, side_by_side, soft_cap
from .gate_base_ultrafuser import Evidence


# exp(-2 * SHARPNESS) is 0 in float32
SHARPNESS = 64.0
# so many digits has a position, where heads are that wide
DIGITS = 31
# a number in float32 takes so many in 16 bits
PIECES = 3
# tokens that a carrier must see: one and the one before it
WINDOW = 2


class Carrier(nn.Module):
    """Hands on from token to token what a gate reads: evidence, and hidden states, by which the next token is judged.

    Its layers come behind those of all specialists, whose attention has one geometry.

    Args:
        config: Of the fused model; it is told of the layers.
        wanted: What evidence.
    """

    def __init__(self, config: UltraFuserConfig, wanted: Evidence):
        super().__init__()
        self.config, self.wanted = config, wanted
        first, widths = config.specialists[0], [c.hidden_size for c in config.specialists]
        self.widths, self.cap = widths, soft_cap(config) or 0.0
        self.heads, self.groups, self.size = heads_of(first)
        self.room = self.groups * self.size
        # of a token that is read in the pass that wrote it, its row; and evidence; both in pieces
        self.known = PIECES * (1 + len(widths) * sum(map(len, wanted)))
        start = sum(c.num_hidden_layers for c in config.specialists)
        number = math.ceil((self.known + sum(widths)) / self.room)
        self.layers = nn.ModuleList(CarrierLayer(first, start + i) for i in range(number))
        config.num_hidden_layers = start + number
        config.layer_types = config.layer_types[:start] + ["sliding_attention"] * number
        if getattr(config, "sliding_window", None) is None:
            config.sliding_window = WINDOW
        digits = min(self.size, DIGITS)
        if config.sliding_window > 2**digits:
            raise ValueError(
                f"The gate {config.gate!r} finds the token before by its position, of which a key in heads of {self.size} holds "
                f"as many digits: {digits} digits tell {2**digits} positions apart, but the specialists' window is "
                f"{config.sliding_window}. Use `generate` for this model, or fuse with another gate, such as 'cross'."
            )
        _register()

    def forward(self, states: list[Tensor], ids: Tensor, positions: Tensor, head: Tensor) -> Tensor:
        """Reads and writes evidence.

        Texts lie end to end, each one's new tokens in a row; what came before them is read from the cache.

        Args:
            states: Each specialist's last hidden states. Shapes (1, tokens, hidden).
            ids: Shape (1, tokens), and so have the positions.
            head: The wide head's weight. Rows beyond the vocabulary are left out.

        Returns:
            See `accumulated`. Shape (1, tokens, specialists, numbers).
        """
        now, positions = torch.cat(states, -1)[0], positions.reshape(-1)
        # counted from 1: two texts with one beginning may start in one pass, and the second reads rows of the first
        rows = torch.arange(1, now.shape[0] + 1, device=now.device, dtype=torch.float32)[:, None]
        unknown = now.new_zeros(now.shape[0], self.known - PIECES)
        read = self._previous(torch.cat([*pieces(rows, now.dtype), unknown, now], -1), positions)
        before, first = read[:, self.known :], positions == 0
        head = head[: self.config.vocab_size]
        log_probs = torch.ops.ultrafuser.judged(before, ids.reshape(-1), head, self.widths, self.cap)
        # whoever is read in the pass that wrote it did not know yet
        found = self._carried_on(log_probs, joined(read[:, :PIECES])[:, 0], first, read)
        known = torch.cat([now.new_zeros(now.shape[0], PIECES), *pieces(found.flatten(1), now.dtype)], -1)
        written = math.ceil(self.known / self.room) * self.room
        read = self._previous(torch.cat([known, now], -1)[:, :written], positions)
        # from what was written, or a compiler would leave the writing out
        return self._carried_on(log_probs, torch.zeros_like(rows[:, 0]), first, read)[None]

    def _carried_on(self, log_probs: Tensor, follows: Tensor, first: Tensor, read: Tensor) -> Tensor:
        before = joined(read[:, PIECES : self.known]).view(log_probs.shape[0], len(self.widths), -1)
        return torch.ops.ultrafuser.carried_on(log_probs, follows, first, before, *self.wanted)

    def _previous(self, left: Tensor, positions: Tensor) -> Tensor:
        """Returns what the token before each left; at the first of a text, what the first one leaves. Shape (tokens, numbers)."""
        queries = SHARPNESS * self._digits(positions - 1, left.dtype).expand(1, self.heads, -1, -1)
        keys = self._digits(positions, left.dtype).expand(1, self.groups, -1, -1)
        values = F.pad(left, (0, -left.shape[1] % self.room)).view(left.shape[0], -1, self.groups, self.size)
        read = []
        for layer, value in zip(self.layers, values.unbind(1), strict=False):
            found = layer(queries, keys, value.transpose(0, 1)[None]).view(left.shape[0], self.groups, -1, self.size)
            # all heads of a group read the same
            read.append(found[:, :, 0].flatten(1))
        return torch.cat(read, -1)[:, : left.shape[1]]

    def _digits(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        places = torch.arange(self.size, device=positions.device).clamp(max=DIGITS)
        return ((positions[:, None] >> places & 1) * 2 - 1).to(dtype)


def pieces(numbers: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Float32 as a sum of numbers of a type with fewer bits."""
    found, rest = [], numbers.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    for _ in range(PIECES):
        found.append(rest.to(dtype))
        rest = rest - found[-1].float()
    return found


def joined(numbers: Tensor) -> Tensor:
    """The sum of `pieces`, which lie side by side."""
    first, *rest = reversed(numbers.float().chunk(PIECES, -1))
    for piece in rest:
        first = first + piece
    return first


def carried_on(
    log_probs: Tensor,
    follows: Tensor,
    first: Tensor,
    before: Tensor,
    decays: Sequence[float],
    switches: Sequence[float],
) -> Tensor:
    """Does what `accumulated` does for tokens of several texts end to end, all side by side.

    In each round a row takes on what the row that it follows has gathered, and follows then whom that one followed, so that
    their number doubles.

    Args:
        log_probs: Of the tokens. Shape (tokens, specialists).
        follows: Row, counted from 1, of the token before, if that is not known yet; 0 where it is known. Shape (tokens,).
        first: Which tokens are the first of a text. Shape (tokens,).
        before: What is known. Shape (tokens, specialists, numbers).
        decays: Of sums.
        switches: Switch probabilities.

    Returns:
        Shape (tokens, specialists, numbers).
    """
    # filled where they are: nothing may be copied to a device while its work is being recorded
    decays, switches = (
        torch.cat([log_probs.new_full((1,), value) for value in values] or [log_probs.new_empty(0)])
        for values in (decays, switches)
    )
    sums, weights = before.tensor_split([len(decays)], -1)
    first = first[:, None, None]
    begins, rows = (follows == 0)[:, None, None] | first, (follows.long() - 1).clamp(min=0)
    sums = _sums(log_probs, begins, first, sums, decays, rows)
    return torch.cat([sums, _log_weights(log_probs, begins, first, weights, switches, rows)], -1)


def _sums(log_probs: Tensor, begins: Tensor, first: Tensor, before: Tensor, decays: Tensor, rows: Tensor) -> Tensor:
    own = log_probs[..., None]
    sums = torch.where(first, 0.0, torch.where(begins, before * decays + own, own))
    kept, reach = torch.where(begins, 0.0, decays).expand_as(sums), 1
    while reach < len(sums):
        sums, kept, rows = sums + kept * sums[rows], kept * kept[rows], rows[rows]
        reach *= 2
    return sums


def _log_weights(
    log_probs: Tensor, begins: Tensor, first: Tensor, before: Tensor, switches: Tensor, rows: Tensor
) -> Tensor:
    """Weights are linear in those before, but for their sum: maps from one to the other are joined, two by two."""
    number = log_probs.shape[1]
    log_probs = log_probs - log_probs.amax(1, keepdim=True)
    stay, share = torch.log1p(-switches), switches.log() - math.log(number)
    same = torch.eye(number, dtype=torch.bool, device=log_probs.device)[..., None]
    # shape (tokens, after, before, switches)
    maps = torch.where(same, torch.logaddexp(stay, share), share) + log_probs[:, None, :, None]
    known = torch.where(first, 0.0, (maps + before[:, None]).logsumexp(2))
    begins = begins[..., None]
    maps, reach = _scaled(torch.where(begins, known[:, :, None], maps)), 1
    while reach < len(maps):
        both = _scaled((maps[:, :, :, None] + maps[rows][:, None]).logsumexp(2))
        maps, begins, rows = torch.where(begins, maps, both), begins | begins[rows], rows[rows]
        reach *= 2
    return maps[:, :, 0].log_softmax(1)


def _scaled(maps: Tensor) -> Tensor:
    # only what one is likelier than the other by tells
    return maps - maps.amax((1, 2), keepdim=True)


def judge(states: Tensor, ids: Tensor, head: Tensor, widths: Sequence[int], cap: float) -> Tensor:
    """Log-probability of each token under each specialist, see `judged`. Shape (tokens, specialists)."""
    parts = [(states[None, :, own], own, cap or None) for own in side_by_side(widths)]
    return judged(parts, ids[None, None], head)[0]


@cache
def _register() -> None:
    """Makes operators of what loops over tokens, so that compilers of the model need not know for how many."""
    for name, function in (("judged", judge), ("carried_on", carried_on)):
        operator = torch.library.custom_op(f"ultrafuser::{name}", function, mutates_args=())
        operator.register_fake(_SHAPES[name])


_SHAPES = {
    "judged": lambda states, ids, head, widths, cap: states.new_empty(states.shape[0], len(widths)).float(),
    "carried_on": lambda log_probs, follows, first, before, decays, switches: torch.empty_like(before),
}


def find_head(backbone: nn.Module) -> None:
    """Lets a backbone know the head that an engine will put beside it, under the name `lm_head`.

    Raises:
        ValueError: Then, if the head is not whole or the cache rounds what is put into it.
    """
    _look_for_heads()
    _without_head.add(backbone)


_without_head = weakref.WeakSet()


@cache
def _look_for_heads() -> None:
    def registered(module: nn.Module, name: str, child: nn.Module) -> None:
        if name == "lm_head" and (backbone := getattr(module, "model", None)) in _without_head:
            _without_head.remove(backbone)
            _check_head(backbone, child)
            backbone.wide_head = (child,)

    register_module_module_registration_hook(registered)


def _check_head(backbone: nn.Module, head: nn.Module) -> None:
    weight, gate = getattr(head, "weight", None), backbone.config.gate
    if weight is None or not weight.is_floating_point() or len(weight) < backbone.config.vocab_size:
        raise ValueError(
            f"The gate {gate!r} asks how likely every specialist held each token, which takes the whole head in plain "
            f"weights, but vLLM has {'none' if weight is None else f'{len(weight)} of its rows'} here. Serve with "
            f"--tensor-parallel-size 1 and without quantising the head, or fuse with another gate, such as 'cross'."
        )
    kept = cache_dtypes(backbone.carrier.layers, weight.dtype)
    if kept != {weight.dtype}:
        raise ValueError(
            f"The gate {gate!r} keeps how well each specialist has predicted the text so far in the key-value cache, which "
            f"must keep it as it is, in {weight.dtype}, but it is in {[str(d) for d in kept]}. Serve with --kv-cache-dtype auto, "
            f"or fuse with another gate, such as 'cross'."
        )
