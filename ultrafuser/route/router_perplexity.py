"""The "perplexity" router: specialists that predict the prompt well."""

from torch import Tensor

from .prompt_reading import Prompts
from .router_base import Router


class PerplexityRouter(Router):
    """Weighs specialists by a softmax of -loss on the prompt, over a temperature: 1, or what follows the colon.

    PackLLM-sim (Mavromatis et al., 2024, arXiv 2404.11531). It needs no training, and no pass beyond the prompt's own.
    """

    @classmethod
    def parse(cls, setting: str | None) -> dict:
        try:
            temperature = float("1" if setting is None else setting)
        except ValueError:
            temperature = 0.0
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(
                f"The temperature of the router 'perplexity' divides losses in nats, so it is a number from 1e-6 to 1e6, but "
                f"got {setting!r:.100}. 'perplexity:1' is the default; lower is more decided."
            )
        return {"temperature": temperature}

    def prior(self, prompts: Prompts) -> Tensor:
        return weights(prompts.losses, self.settings["temperature"])


def weights(losses: Tensor, temperature: float = 1.0) -> Tensor:
    """Turns losses on prompts into weights. Shapes (..., specialists)."""
    return (-losses / temperature).softmax(-1)
