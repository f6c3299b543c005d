"""The "states" router: a small classifier of what all specialists make of the prompt."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .prompt_reading import Prompts
from .router_base import Examples, Router


WIDTH, STEPS = 128, 300


class StatesRouter(Router):
    """Predicts which specialist answers best from all specialists' mean hidden states on the prompt, side by side.

    Fusion of Experts (Wang et al., 2024, *Fusing Models with Complementary Expertise*): one hidden layer, AdamW at 1e-3 with a weight decay of 1e-4 and
    cross-entropy. Its states are those of the pass over the prompt, which the answer needs anyway.
    """

    trains = True

    @classmethod
    def trained(cls, examples: Examples, settings: dict) -> "StatesRouter":
        states = torch.cat([batch.mean_states() for batch in examples.prompts])
        mean, spread = states.mean(0), states.std(0, correction=0).clamp(min=1e-6)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(len(mean), WIDTH), nn.ReLU(), nn.Linear(WIDTH, examples.losses.shape[-1]))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
            for _ in range(STEPS):
                F.cross_entropy(model((states - mean) / spread), examples.best).backward()
                optimizer.step()
                optimizer.zero_grad()
        learned = {key.replace(".", "_"): tensor.detach() for key, tensor in model.state_dict().items()}
        return cls({}, {"mean": mean, "spread": spread, **learned})

    def prior(self, prompts: Prompts) -> Tensor:
        own = self.tensors
        states = (prompts.mean_states() - own["mean"]) / own["spread"]
        hidden = F.linear(states, own["0_weight"], own["0_bias"]).relu()
        return F.linear(hidden, own["2_weight"], own["2_bias"]).softmax(-1)
