"""Base of all readers: how tokens reach the specialists, and what else of a fused model depends on it."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .compat_ultrafuser import CACHE, CollectedPlans
from .families_ultrafuser import side_by_side
from .inputs_ultrafuser import Tokens


# the one part of `Specialists` where all specialists are adapters of it
BASE = "base"


class Specialists(CollectedPlans):
    """The specialists' backbones by name; or their base alone, where specialists are adapters of it."""


class Reader:
    """Base of all readers: every specialist reads the same tokens, each with its part of one cache.

    A reader is one file with one subclass, and one line in `READERS`. It has no parameters, and is made anew at each
    call, around the modules that `build` made for the model. What follows from the configuration is a class method.

    Attributes:
        one_by_one: Whether each specialist is a module of its own, which can run while the others do not.
        shares_head: Whether all specialists have one head in common.
    """

    one_by_one = True
    shares_head = False

    def __init__(self, config, specialists: nn.Module):
        self.config, self.specialists = config, specialists

    @classmethod
    def check(cls, config) -> None:
        """Rejects, by a ValueError, a configuration whose specialists cannot be read in this way."""

    @classmethod
    def check_engine(cls, config, engine: str) -> None:
        """Rejects, by a ValueError, an engine that lays all texts end to end in one row, if that cannot be read."""

    @classmethod
    def check_newcomer(cls, config) -> None:
        """Rejects, by a ValueError, adding a specialist, if that takes more than a module beside the others."""

    @classmethod
    def backbones(cls, configs: list) -> list:
        """Returns the configurations of the backbones to build, given those of the specialists."""
        return configs

    @classmethod
    def build(cls, config) -> Specialists:
        """Builds the backbones without loading anything."""
        pairs = zip(config.specialist_names, config.specialists, strict=True)
        return Specialists({name: AutoModel.from_config(c) for name, c in pairs})

    @classmethod
    def head_columns(cls, config) -> list[slice]:
        """Returns each specialist's columns of the head."""
        return side_by_side(c.hidden_size for c in config.specialists)

    @classmethod
    def sizes(cls, config, sizes: dict, linear: dict[str, torch.Size]) -> dict:
        """Returns the size of each part of the fused model but its gate.

        Args:
            config: The fused model's configuration.
            sizes: Size of each specialist as a model of its own, by name: a dataclass of numbers of parameters.
            linear: Shape of each linear layer of the first specialist's backbone, by name.
        """
        return sizes

    @classmethod
    def frozen(cls, sizes: dict) -> int:
        """Returns how many parameters the joint stage leaves as they are, given what `sizes` returned."""
        return 0

    def read(self, tokens: Tokens, past_key_values: Cache | None, **kwargs) -> list[ModelOutput]:
        """Runs all specialists on the same tokens. Returns the output of each, in the order of the configuration.

        Args:
            tokens: What they read.
            past_key_values: One cache for all of them.
            **kwargs: Passed on to every backbone.
        """
        raise NotImplementedError

    def masks(self, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs):
        """Returns attention masks for static caches, prepared in advance: a mask, or a dict of them."""
        raise NotImplementedError

    def input_embeddings(self) -> nn.Module:
        """Returns the token embeddings as one module."""
        raise NotImplementedError

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets the token embeddings, from what `input_embeddings` returns."""
        raise NotImplementedError

    def resize_embeddings(self, *sizes) -> None:
        """Resizes every specialist's token embedding. `sizes` are arguments of `resize_token_embeddings`."""
        for specialist in self.specialists.values():
            specialist.resize_token_embeddings(*sizes)

    def one(self, k: int) -> PreTrainedModel:
        """Returns the backbone of specialist k as an ordinary model."""
        raise NotImplementedError

    def head_of(self, k: int, head: Tensor) -> Tensor:
        """Returns the head of specialist k from the wide head's weight. Shape (vocab, hidden)."""
        return head[:, self.head_columns(self.config)[k]]

    def shared_parts(self, chosen: list[bool]) -> dict[str, tuple[int, Tensor]]:
        """Finds the parts of the chosen specialists in those tensors in which all specialists have a part.

        Returns:
            Name of the tensor in the causal language model to its dimension, and the indices along it.
        """
        raise NotImplementedError

    def train_only(self, model: PreTrainedModel, names: list[str]) -> None:
        """Freezes what the joint stage must not train of a causal language model, but for `shared_parts`."""
        raise NotImplementedError

    def probe(self, tolerance: float) -> None:
        """Rejects, by a ValueError, specialists that predict among the others what they do not predict alone."""


def run(backbone: PreTrainedModel, tokens: Tokens, **kwargs) -> ModelOutput:
    """Runs a backbone; without autograd if that would only store activations that no gradient needs."""
    frozen = torch.is_grad_enabled() and not any(p.requires_grad for p in backbone.parameters())
    if frozen and isinstance(kwargs.get(CACHE), Cache):
        # prefix tuning trains keys and values
        kept = (getattr(layer, "keys", None) for layer in kwargs[CACHE].layers)
        frozen = not any(keys is not None and keys.requires_grad for keys in kept)
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    with torch.no_grad() if frozen else nullcontext():
        return backbone(**inputs, position_ids=tokens.position_ids, return_dict=True, **kwargs)
