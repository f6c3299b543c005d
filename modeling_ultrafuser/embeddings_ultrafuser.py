"""The specialists' token embeddings as one module, for code that knows one input embedding."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class TokenEmbeddings(nn.ModuleDict):
    """Every specialist's token embedding, by name: what `get_input_embeddings` returns.

    Hooks are registered on each of them, and `parameters()` are those of all. Training noise (NEFTune) sets an
    attribute, which each of them gets. What only one embedding could answer is refused. Made anew at each call, and not
    a part of the model: the embeddings stay at their places in the specialists.
    """

    def __init__(self, embeddings: dict[str, nn.Module]):
        super().__init__(embeddings)
        self.training = all(e.training for e in embeddings.values())

    def _on_each(register: str):  # noqa: N805
        def register_on_each(self, *args, **kwargs) -> "Handles":
            return Handles([getattr(e, register)(*args, **kwargs) for e in self.values()])

        return register_on_each

    register_forward_hook = _on_each("register_forward_hook")
    register_forward_pre_hook = _on_each("register_forward_pre_hook")
    register_full_backward_hook = _on_each("register_full_backward_hook")
    register_full_backward_pre_hook = _on_each("register_full_backward_pre_hook")

    def children(self) -> Iterator[nn.Module]:
        """None, so that FSDP, which shards a module with its children, shards them where they are called."""
        return iter(())

    @property
    def neftune_noise_alpha(self) -> float:
        """Amount of noise that training adds to the embeddings."""
        return next(iter(self.values())).neftune_noise_alpha

    @neftune_noise_alpha.setter
    def neftune_noise_alpha(self, value: float) -> None:
        for embedding in self.values():
            embedding.neftune_noise_alpha = value

    @neftune_noise_alpha.deleter
    def neftune_noise_alpha(self) -> None:
        for embedding in self.values():
            del embedding.neftune_noise_alpha

    @property
    def num_embeddings(self) -> int:
        """Rows, the same number in each."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width of all side by side."""
        return self.weight.shape[1]

    @property
    def weight(self) -> "NoOneWeight":
        """The shape of all weights side by side, (vocab, sum of widths). Numbers are read from each."""
        return NoOneWeight.of([e.weight for e in self.values()])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Refused: no one vector stands for a token.

        Raises:
            ValueError: Always, with the way out.
        """
        raise ValueError(
            f"A fused model reads token ids, because its specialists {list(self)} embed the same token differently, so "
            f"there are no `inputs_embeds` to compute (prompt tuning and p-tuning of PEFT do). Use LoRA, prefix tuning, "
            f"or one specialist: `model.specialist(name)`."
        )

    def __eq__(self, other) -> bool:
        """Returns whether both hold the same modules. Who compares with another module looks for the one path to save.

        Raises:
            ValueError: If an embedding is to be saved by the path of one module.
        """
        if isinstance(other, TokenEmbeddings):
            return list(self.items()) == list(other.items())
        # PEFT wraps embeddings that an adapter trains, and saves each of them by itself
        plain = [name for name, e in self.items() if not hasattr(e, "modules_to_save")]
        if isinstance(other, nn.Module) and plain:
            raise ValueError(
                f"Each specialist has a token embedding of its own, but what saves them expects one (an adapter's "
                f"`save_embedding_layers`) and would leave out those of {plain}. Train them as a part of the adapter, "
                f"modules_to_save=['embed_tokens', 'lm_head'], or save with save_embedding_layers=False and the model "
                f"itself beside it, `save_pretrained`."
            )
        return False

    __hash__ = nn.ModuleDict.__hash__


class Handles:
    """Handle of a hook that is registered on several modules."""

    def __init__(self, handles: list):
        self.handles = handles

    def remove(self) -> None:
        """Removes the hook from all of them."""
        for handle in self.handles:
            handle.remove()


class NoOneWeight(Tensor):
    """A shape without numbers, which tells the number of rows, and refuses whatever would read or write one weight."""

    _TOLD = (
        *(Tensor.shape.__get__, Tensor.size, Tensor.dim, Tensor.ndim.__get__, Tensor.__len__, Tensor.numel),
        *(Tensor.dtype.__get__, Tensor.is_floating_point, Tensor.requires_grad.__get__),
    )

    @staticmethod
    def of(weights: list[Tensor]) -> "NoOneWeight":
        """The shape of these weights side by side."""
        shape = (weights[0].shape[0], sum(w.shape[1] for w in weights))
        whole = torch.empty(shape, dtype=weights[0].dtype, device="meta").as_subclass(NoOneWeight)
        whole.inputs_device = weights[0].device
        return whole

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__:
            # where token ids are sent to
            return args[0].inputs_device
        if func in cls._TOLD:
            return super().__torch_function__(func, types, args, kwargs)
        raise ValueError(
            "Each specialist has a token embedding of its own, so `get_input_embeddings().weight` tells a shape alone. "
            "Read or change each: `model.model.specialists[name].get_input_embeddings().weight`."
        )
