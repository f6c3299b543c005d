"""Routes requests: a prior on the token gate, or one specialist that answers alone."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.compat_ultrafuser import CACHE
from modeling_ultrafuser.fusions_ultrafuser import check_loss, fusion_class
from modeling_ultrafuser.refusals_ultrafuser import Refusal

from .prompt_reading import Prompts
from .router_base import Router
from .router_files import load_router


class Routed(NamedTuple):
    """A request that has been routed.

    Attributes:
        model: Answers it: the fused model, or one of its specialists.
        options: What to generate with.
        prior: Weights of the specialists, or None. Shape (batch, specialists).
    """

    model: PreTrainedModel
    options: dict
    prior: Tensor | None = None


class PromptRoute:
    """Chooses who answers, request by request.

        route = PromptRoute(model, tokenizer, "perplexity")
        answering, options, _ = route(**inputs)
        answering.generate(**inputs, **options)

    A router's weights are a prior on the token gate, as GLIDER (2024) joins a router of requests
    with one of tokens: the gate's weights are multiplied by them. Or else the specialist with the largest one answers alone,
    at the price of one, where specialists are models of their own. Prompts of one batch that differ in it are answered by
    the fused model with a prior of one specialist each, which gives the same greedy tokens.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        router: A folder that `ultrafuser route` wrote, the name of a router without training, or a router. Default: none,
            so that only requests that come with a prior are routed.
        alone: Whether one specialist answers.

    Raises:
        ValueError: If there is no such router, or it chooses among others, or its weights would have no effect.
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        router: str | Router | None = None,
        *,
        alone: bool = False,
    ):
        if alone and router is None:
            raise ValueError("One specialist answers alone if a router chooses it, but there is none. Name a router.")
        if router is not None and not alone and model.config.signed_weights is not None:
            raise ValueError(
                "A router's weights multiply shares that sum to 1, but this model's weights are signed. Let the chosen specialist "
                "answer alone."
            )
        self.rule = fusion_class(model.config.fusion)
        if router is not None and not alone and not self.rule.reads_gate:
            raise ValueError(
                f"A router's weights multiply the gate's, which fusion={model.config.fusion!r} does not read. Let the chosen "
                f"specialist answer alone."
            )
        self.model, self.tokenizer, self.alone = model, tokenizer, alone
        names = model.config.specialist_names
        self.router = load_router(router, names) if isinstance(router, str) else router
        if self.router is not None and self.router.fits:
            _check_fits(model.config)
        self.specialist = cache(model.specialist)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, prior: Tensor | None = None) -> Routed:
        """Routes a batch of prompts.

        Args:
            input_ids: Token ids, padded on the left. Shape (batch, seq).
            attention_mask: 1 for tokens, 0 for padding. Shape (batch, seq).
            prior: In place of the router's. Shape (batch, specialists).
        """
        prompts = Prompts(self.model, self.tokenizer, input_ids, attention_mask)
        if prior is None and self.router is None:
            return Routed(self.model, {})
        prior = self.router.prior(prompts) if prior is None else prior
        if self.alone:
            prior = F.one_hot(prior.argmax(-1), prior.shape[-1]).float()
            chosen = prior.argmax(-1).unique().tolist()
            if len(chosen) == 1 and self.model.model.reader_class.one_by_one:
                return Routed(self.specialist(self.model.config.specialist_names[chosen[0]]), {}, prior)
            if self.rule.needs_all:
                raise ValueError(
                    f"Prompts that different specialists answer, or adapters of one base, are answered by the fused model with "
                    f"weight on one each, but fusion={self.model.config.fusion!r} counts the others, too. Ask one prompt at a "
                    f"time, of a model whose specialists are no adapters."
                )
        return Routed(self.model, {"gate_prior": prior.to(input_ids.device), **self._begun(prompts)}, prior)

    def _begun(self, prompts: Prompts) -> dict:
        """Returns the cache of what the router has read, where an answer can go on from it."""
        settings = self.model.generation_config
        plain = settings.cache_implementation is None and settings.use_cache is not False
        return {CACHE: prompts.cache} if prompts.cache is not None and plain and self.model.goes_back else {}


def _check_fits(config) -> None:
    """Refuses models without a loss that changes with a prior."""
    if config.signed_weights is not None:
        raise Refusal(
            "The router is fitted to the prompt's loss, and this model's weights are signed",
            "It weighs shares that sum to 1",
            "Choose another router, such as 'perplexity'.",
            about="router",
        )
    check_loss(config)
