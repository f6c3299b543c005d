"""The "nearest" router: what did well on the most similar prompts, as one specialist sees them."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .prompt_reading import Prompts
from .router_base import Examples, Router


ASKED = 1  # specialists that read a prompt to place it among the others
NEIGHBOURS = 9


class NearestRouter(Router):
    """Weighs specialists by how often each was the best on the nearest known prompts: 9, or what follows the colon.

    Prompts are compared by the cosine of the first specialist's mean hidden states, so that a prompt costs one pass of one
    specialist before one is chosen. The frugal form of Fusion of Experts (Wang et al., 2024) estimates by nearest
    neighbours, too, which experts are worth asking next; this stops after the first.
    """

    trains = True

    @classmethod
    def parse(cls, setting: str | None) -> dict:
        number = NEIGHBOURS if setting is None else int(setting) if setting.isdecimal() else 0
        if number < 1:
            raise ValueError(
                f"The router 'nearest' counts neighbours, so that its setting is a positive integer, but got {setting!r:.100}. "
                f"'nearest:{NEIGHBOURS}' is the default."
            )
        return {"neighbours": number}

    @classmethod
    def trained(cls, examples: Examples, settings: dict) -> "NearestRouter":
        states = torch.cat([batch.mean_states(ASKED) for batch in examples.prompts])
        best = F.one_hot(examples.best, examples.losses.shape[-1]).float()
        return cls(settings, {"states": F.normalize(states, dim=-1), "best": best})

    def prior(self, prompts: Prompts) -> Tensor:
        known, best = self.tensors["states"], self.tensors["best"]
        likeness = F.normalize(prompts.mean_states(ASKED), dim=-1) @ known.T
        nearest = likeness.topk(min(self.settings["neighbours"], len(known)), -1).indices
        return best[nearest].mean(1)
