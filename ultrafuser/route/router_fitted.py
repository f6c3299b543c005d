"""The "fitted" router: weights that make the prompt likely, by gradient steps."""

import torch
from torch import Tensor

from .prompt_reading import Prompts
from .router_base import Router


STEPS, RATE = 3, 1.0


class FittedRouter(Router):
    """Takes gradient steps on numbers that are added to the gate's scores, from the fused model's loss on the prompt.

    The setting is the number of steps, and their rate, "fitted:3,1" by default. Of all steps that with the least loss on the
    prompt is taken, so that no prompt's loss rises. PackLLM-opt (Mavromatis et al., 2024, arXiv 2404.11531) minimises the
    prompt's perplexity over the weights of whole models, too, by a greedy algorithm; here a gate is under them. *Rewiring Experts
    on the Fly* (Su et al., 2025) adds vectors to the router logits of some layers, from time to time while it writes; here
    there is one gate, and the prompt.

    The specialists read the prompt once. Each step, and the start, applies their heads to it once more.
    """

    fits = True

    @classmethod
    def parse(cls, setting: str | None) -> dict:
        steps, _, rate = (f"{STEPS}" if setting is None else setting).partition(",")
        try:
            found = {"steps": int(steps), "rate": float(rate or RATE)}
        except ValueError:
            found = {"steps": -1, "rate": RATE}
        if found["steps"] < 0 or not 0 < found["rate"] <= 1e3:
            raise ValueError(
                f"The router 'fitted' takes gradient steps at a rate, so that its setting is their number, from 0 on, and the "
                f"rate, above 0 and up to 1000, but got {setting!r:.100}. 'fitted:{STEPS},{RATE:g}' is the default."
            )
        return found

    def prior(self, prompts: Prompts) -> Tensor:
        # `chat` answers in inference mode, whose tensors have no gradient
        with torch.inference_mode(False), torch.enable_grad():
            return self._fitted(prompts)

    def _fitted(self, prompts: Prompts) -> Tensor:
        best = torch.zeros(len(prompts.input_ids), len(prompts.model.config.specialists))
        added, least = best, torch.full((len(best),), torch.inf)
        for _ in range(self.settings["steps"] + 1):
            added = added.detach().requires_grad_()
            losses = prompts.fused_losses(added.softmax(-1))
            (slope,) = torch.autograd.grad(losses.sum(), added)
            losses, better = losses.detach(), losses.detach() < least
            best, least = torch.where(better[:, None], added.detach(), best), torch.where(better, losses, least)
            added = added - self.settings["rate"] * slope
        return best.softmax(-1)
