"""Learns the mix: a reward measures the domains, a policy answers with a mix, and guards keep it within bounds."""

import numpy as np
import torch

from .policies import POLICIES
from .policies.policy_base import Smoothing
from .rewards import REWARDS
from .rewards.reward_base import usable_rewards
from .shares import effective_epochs, guarded


class MixController:
    """Measures rewards every `mix_every` steps, lets a policy answer, and puts the mix in force.

    Every process computes the same numbers: statistics are summed over all of them before anything reads them, and the
    resulting mixes are compared.

    Args:
        trainer: The stage. Its sampler, statistics and model are used.

    Raises:
        ValueError: If the target is no domain, the reward cannot be measured, or the floor is too high.
    """

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        if self.args.mix_target is not None and self.args.mix_target not in trainer.domains:
            raise ValueError(f"`mix_target` must be one of {trainer.domains}, but is {self.args.mix_target!r}.")
        guarded(trainer.prior, floor=self.args.mix_floor)  # refuses a floor that is too high now, not in an hour
        self.reward = REWARDS[self.args.mix_reward](trainer)
        settings = self.args.mix_policy_settings or {}
        self.policy = POLICIES[self.args.mix_policy](trainer.prior, **settings)
        self.smoothing = Smoothing(len(trainer.domains), self.args.mix_smoothing)
        self.mixes = [(0, trainer.prior.tolist())]  # in `mix_unit`; the sampler holds them in examples
        self.rewards = np.full(len(trainer.domains), np.nan)

    def mix_at(self, step: int) -> np.ndarray:
        """The mix in force for the batch of that optimizer step, in `mix_unit`. Shape (domains,)."""
        if self.args.mix_shadow:
            return np.array(self.mixes[0][1])
        return np.array(next(mix for start, mix in reversed(self.mixes) if start <= step))

    def update(self) -> None:
        """Measures, learns, and sets the mix that takes effect `mix_delay` steps from now."""
        trainer, step = self.trainer, self.trainer.state.global_step
        mix = self.mix_at(max(step - 1, 0))
        with np.errstate(all="ignore"):
            self.rewards = self.reward.measure()
        rewards = usable_rewards(self.rewards, mix, trainer.domains)
        if rewards is None:
            return
        new = guarded(
            self.policy.update(self.smoothing.update(rewards), mix),
            floor=self.args.mix_floor,
            epochs=effective_epochs(trainer.sampler.counts(step), trainer.sizes)[: len(trainer.domains)],
            max_epochs=np.inf if self.args.mix_max_epochs is None else self.args.mix_max_epochs,
        )
        self._check_same_everywhere(new)
        start = step + self.args.mix_delay
        self.mixes.append((start, new.tolist()))
        if not self.args.mix_shadow:
            trainer.sampler.set_mix(trainer.in_examples(new), start)

    def metrics(self) -> dict[str, float]:
        """For the log: rewards as measured, and the mix that was learned last."""
        named = zip(self.trainer.domains, self.rewards, self.mixes[-1][1], strict=True)
        found = {k: v for d, r, m in named for k, v in ((f"reward/{d}", r), (f"learned_mix/{d}", m))}
        return {name: value for name, value in found.items() if np.isfinite(value)}  # none before the first update

    def state_dict(self) -> dict:
        """Everything that the next update depends on."""
        return {
            "policy": self.policy.state_dict(),
            "smoothing": self.smoothing.state_dict(),
            "mixes": self.mixes,
            "rewards": self.rewards.tolist(),
            "baseline": None if self.reward.baseline is None else self.reward.baseline.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()`. What the pool scored at the start cannot be measured again."""
        self.policy.load_state_dict(state["policy"])
        self.smoothing.load_state_dict(state["smoothing"])
        self.mixes = [(start, mix) for start, mix in state["mixes"]]
        self.rewards = np.array(state["rewards"], float)
        self.reward.baseline = None if state["baseline"] is None else np.array(state["baseline"])

    def _check_same_everywhere(self, mix: np.ndarray) -> None:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            own = torch.tensor(mix, dtype=torch.float64, device=accelerator.device)[None]
            every = accelerator.gather(own)
            if not (every == every[0]).all():
                raise RuntimeError(
                    f"Every process must draw from the same mix, but they have {every.tolist()}. Are versions and seeds "
                    f"the same on all machines?"
                )
