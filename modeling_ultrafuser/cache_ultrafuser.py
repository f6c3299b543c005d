"""One key-value cache for all specialists: the library's own, with a window onto it for each specialist."""

import torch
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache

from .compat_ultrafuser import PAGES_CHANGE_KWARGS, init_without_layers
from .families_ultrafuser import common, heads_of, of_each


class SpecialistCache(Cache):
    """One specialist's layers of a shared cache, counted from 0.

    Everything a specialist asks of its cache (sequence length, mask sizes, recurrent states) is answered for its own
    layers, so that it never sees the length of a specialist that already ran in this step. The tensors stay in the
    shared cache, which is what `generate` crops, reorders and repeats.

    Args:
        cache: The shared cache, with one layer for every layer of every specialist.
        start: Position of this specialist's first layer in `cache`.
        end: Position behind its last layer.
    """

    def __init__(self, cache: Cache, start: int, end: int):
        self.cache, self.start, self.end = cache, start, end
        init_without_layers(self)

    @property
    def layers(self):
        return self.cache.layers[self.start : self.end]

    def __len__(self) -> int:
        return self.end - self.start

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        # through the shared cache, which knows about offloading and prefetching
        return self.cache.update(key_states, value_states, layer_idx + self.start, *args, **kwargs)


def refuse_cache_of_one_shape(config, cache: Cache) -> None:
    """Rejects keys and values of one shape for all layers, as PEFT's prefix tuning makes them, where shapes differ.

    Raises:
        ValueError: Naming each specialist's geometry.
    """
    # these fields are absent where specialists differ
    if hasattr(config, "num_key_value_heads") and hasattr(config, "head_dim"):
        return
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    if any(k is None for k in keys) or common((k.shape[1], k.shape[3]) for k in keys if k.ndim == 4) is None:
        return
    geometry = of_each(config, lambda c: heads_of(c)._asdict())
    raise ValueError(
        f"Keys and values were given in one shape for all layers (prefix tuning does), {tuple(keys[0].shape)}, but those "
        f"of the specialists differ: {geometry}. Use LoRA, or prefix tuning on one specialist: `model.specialist(name)`."
    )


class PagedWindow(PagedAttentionCache):
    """The same window onto the paged cache of continuous batching (`generate_batch`).

    Attention looks for this very class. Everything but the layer number is the shared cache's own.
    """

    def __init__(self, cache: PagedAttentionCache, start: int):
        # without the pages of the library's
        self.cache, self.start = cache, start

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return self.cache.update(key_states, value_states, layer_idx + self.start, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["cache"], name)


class PagedRecord(PagedAttentionCache):
    """A stand-in for the paged cache that serves one text, and remembers in `written` what each layer put in."""

    def __init__(self):
        self.written = {}

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        if PAGES_CHANGE_KWARGS:
            _ = kwargs["kwargs"]["max_length_k"]
        before = self.written.setdefault(layer_idx, [])
        before.append((key_states, value_states))
        keys, values = (torch.cat(states, dim=2) for states in zip(*before, strict=True))
        return keys, values

    # the library's frees memory
    def __del__(self):
        pass
