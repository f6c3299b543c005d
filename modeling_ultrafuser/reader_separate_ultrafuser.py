"""Specialists that are backbones of their own, run one after another."""

from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .cache_ultrafuser import PagedWindow, SpecialistCache
from .causal_ultrafuser import masks_for_generate
from .compat_ultrafuser import CACHE
from .embeddings_ultrafuser import TokenEmbeddings
from .families_ultrafuser import specialist_layer_types
from .inputs_ultrafuser import Tokens, positions_of, view
from .reader_base_ultrafuser import Reader, run


class SeparateReader(Reader):
    """Runs one backbone after another, each on its layers of the cache."""

    @property
    def first_layers(self) -> list[int]:
        """Index of each specialist's first layer in the cache, and behind them how many layers there are."""
        return [*accumulate((c.num_hidden_layers for c in self.config.specialists), initial=0)]

    def read(self, tokens: Tokens, past_key_values: Cache | None, **kwargs) -> list[ModelOutput]:
        return [self.read_one(k, view(tokens, k), past_key_values, **kwargs) for k in range(len(self.specialists))]

    def read_one(self, k: int, tokens: Tokens, past_key_values: Cache | None, **kwargs) -> ModelOutput:
        """Runs specialist k alone."""
        name = self.config.specialist_names[k]
        layers = self.first_layers[k : k + 2]
        return read_within(self.specialists[name], name, layers, tokens, past_key_values, **kwargs)

    def read_rest(self, k: int, tokens: Tokens, past_key_values: Cache) -> Tensor:
        """Lets specialist k read what it has not read yet of a whole text, as its part of the cache tells.

        Returns:
            Its last hidden states at the tokens that were new to it. Shape (batch, new, hidden).
        """
        new = tokens.input_ids[:, self.tokens_read(k, past_key_values) :]
        mask = tokens.attention_mask
        positions = None if mask is None else positions_of(mask, new.shape[1])
        return self.read_one(k, Tokens(new, mask, positions), past_key_values, use_cache=True).last_hidden_state

    def tokens_read(self, k: int, past_key_values: Cache) -> int:
        """Counts the tokens that specialist k has read."""
        return int(self.part(k, past_key_values).get_seq_length())

    def part(self, k: int, past_key_values: Cache) -> SpecialistCache:
        """Returns specialist k's part of the cache."""
        return SpecialistCache(past_key_values, *self.first_layers[k : k + 2])

    def masks(self, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs) -> dict:
        masks = {}
        for k, (name, specialist) in enumerate(self.specialists.items()):
            masks |= named_masks(
                specialist, name, inputs_embeds, attention_mask, self.part(k, past_key_values), **kwargs
            )
        return masks

    def input_embeddings(self) -> TokenEmbeddings:
        return TokenEmbeddings({name: s.get_input_embeddings() for name, s in self.specialists.items()})

    def set_input_embeddings(self, value: nn.Module) -> None:
        names = list(self.specialists)
        if not isinstance(value, nn.ModuleDict) or set(value) != set(names):
            raise ValueError(
                f"Each specialist has a token embedding of its own, so that setting them takes one for each of {names}, "
                f"but got {type(value).__name__}. Pass `nn.ModuleDict` of them by name, or set one alone: "
                f"`model.model.specialists[name].set_input_embeddings(...)`."
            )
        for name in names:
            self.specialists[name].set_input_embeddings(value[name])

    def one(self, k: int) -> PreTrainedModel:
        return self.specialists[self.config.specialist_names[k]]

    def shared_parts(self, chosen: list[bool]) -> dict[str, tuple[int, Tensor]]:
        sizes = torch.tensor([c.hidden_size for c in self.config.specialists])
        return {"lm_head.weight": (1, torch.repeat_interleave(torch.tensor(chosen), sizes).nonzero()[:, 0])}

    def train_only(self, model: PreTrainedModel, names: list[str]) -> None:
        for name in self.specialists.keys() - set(names):
            self.specialists[name].requires_grad_(False)


def read_within(
    backbone: PreTrainedModel, name: str, layers: list[int], tokens: Tokens, past_key_values: Cache | None, **kwargs
) -> ModelOutput:
    """Runs one specialist's backbone on its layers of the cache: from the first of them to the one behind the last."""
    paged = kwargs.pop("cache", None)
    if past_key_values is not None:
        kwargs[CACHE] = SpecialistCache(past_key_values, *layers)
    if paged is not None:
        kwargs["cache"] = PagedWindow(paged, layers[0])
    mask = specialist_mask(tokens.attention_mask, name, backbone.config)
    return run(backbone, tokens._replace(attention_mask=mask), **kwargs)


def named_masks(backbone: PreTrainedModel, name: str, *args, **kwargs) -> dict[str, Tensor]:
    """Makes a specialist's masks for static caches, by its name, or "name/layer_type", as they lie among those of others."""
    mask = masks_for_generate(backbone, *args, **kwargs)
    if isinstance(mask, dict):
        return {f"{name}/{layer_type}": m for layer_type, m in mask.items()}
    return {name: mask}


def specialist_mask(mask: Tensor | dict[str, Tensor] | None, name: str, config) -> Tensor | dict[str, Tensor] | None:
    """Returns one specialist's part of masks prepared in advance; anything else is for all specialists alike."""
    if not isinstance(mask, dict):
        return mask
    if name in mask:
        return mask[name]
    by_type = {key.removeprefix(f"{name}/"): m for key, m in mask.items() if key.startswith(f"{name}/")}
    if by_type:
        return by_type
    # masks by layer type, as continuous batching prepares them
    return mask if hasattr(config, "layer_types") else mask[specialist_layer_types(config)[0]]
