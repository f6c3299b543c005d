"""Base of all routers: from a prompt to one weight per specialist for the whole request."""

from dataclasses import dataclass

from torch import Tensor

from .prompt_reading import Prompts


@dataclass
class Examples:
    """Prompts to train a router on, and how well each specialist answers them.

    Attributes:
        prompts: In batches.
        losses: Nats per token of each specialist on the answers. Shape (examples, specialists).
        domains: Name of each example's domain.
    """

    prompts: list[Prompts]
    losses: Tensor
    domains: list[str]

    @property
    def best(self) -> Tensor:
        """Returns the specialist with the least loss on each answer. Shape (examples,)."""
        return self.losses.argmin(-1)

    @property
    def texts(self) -> list[str]:
        """Returns the prompts as text."""
        return [text for batch in self.prompts for text in batch.texts]


class Router:
    """Base of all routers: weighs the specialists for a whole request, from its prompt.

    A router is one file with one subclass, and one line in `ROUTERS`. `prior` is all that one without training must define;
    one that is trained sets `trains` and defines `trained`. What it knows is `settings` and `tensors`, which are saved.

    Args:
        settings: Anything that JSON can hold.
        tensors: What it has learned, by name.

    Attributes:
        trains: Whether it is trained: by `ultrafuser route`.
        fits: Whether it goes by the fused model's loss under a prior, which not all models have.
    """

    trains = False
    fits = False

    def __init__(self, settings: dict, tensors: dict[str, Tensor] | None = None):
        self.settings, self.tensors = settings, tensors or {}

    @classmethod
    def parse(cls, setting: str | None) -> dict:
        """Reads what follows the colon in a name such as "nearest:9", None without a colon, as `settings`.

        Raises:
            ValueError: If it is no setting of this router.
        """
        if setting is not None:
            raise ValueError(f"This router has no setting, but got {setting!r:.100}. Leave it out.")
        return {}

    @classmethod
    def trained(cls, examples: Examples, settings: dict) -> "Router":
        """Trains a router.

        Args:
            examples: Prompts with answers.
            settings: As `parse` returned them.
        """
        raise NotImplementedError

    def prior(self, prompts: Prompts) -> Tensor:
        """Weighs the specialists: see `gate_prior` of the model.

        Returns:
            Weights that sum to 1. Shape (batch, specialists).
        """
        raise NotImplementedError
