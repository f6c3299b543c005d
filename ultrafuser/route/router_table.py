"""The "table" router: the prompt's category, then the specialist that did best there."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .prompt_reading import Prompts
from .router_base import Examples
from .router_words import TextRouter, fitted, probabilities


class TableRouter(TextRouter):
    """Predicts the prompt's category, and looks up which specialist has the least loss there: it gets all of the weight.

    The two steps of Composition of Experts (2024): a classifier of categories, and a table of category and expert. Categories are the domains of the data; they need not be named as specialists are. An unsure
    prediction weighs the rows of the table by its probabilities.
    """

    trains = True

    @classmethod
    def trained(cls, examples: Examples, settings: dict) -> "TableRouter":
        categories = sorted(set(examples.domains))
        labels = torch.tensor([categories.index(domain) for domain in examples.domains])
        settings, tensors = fitted(examples.texts, labels.tolist(), len(categories))
        table = torch.stack([examples.losses[labels == c].mean(0) for c in range(len(categories))])
        return cls({**settings, "categories": categories}, {**tensors, "table": -table})

    def prior(self, prompts: Prompts) -> Tensor:
        scores = probabilities(self, prompts.texts) @ self.tensors["table"].float()
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()
