"""Learns the mix: a reward measures the domains, a policy answers with a mix, and guards keep it within bounds."""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from ..samplers import DomainSampler
from .policies import POLICIES
from .policies.policy_base import Smoothing
from .probe import Probe
from .rewards import REWARDS
from .rewards.reward_base import usable_rewards
from .shares import guarded


class MixController:
    """Measures rewards, lets a policy answer, and puts the mix in force.

    Every process computes the same numbers: the probe sums over all of them, and the resulting mixes are compared.

    Args:
        args: The stage's settings, see `MixConfig`.
        probe: Measures the stage.
        sampler: Draws from the mix.
        prior: The mix that learning starts from, in `mix_unit`. Shape (domains,).
        in_examples: Turns a mix in `mix_unit` into one in examples, which the sampler takes.

    Raises:
        ValueError: If the target is no domain, the reward cannot be measured, or the floor is too high.
    """

    def __init__(
        self, args, probe: Probe, sampler: DomainSampler, prior: ndarray, in_examples: Callable[[ndarray], ndarray]
    ):
        self.args, self.probe, self.sampler, self.in_examples = args, probe, sampler, in_examples
        if args.mix_target is not None and args.mix_target not in probe.domains:
            raise ValueError(f"`mix_target` must be one of {probe.domains}, but is {args.mix_target!r}.")
        guarded(prior, floor=args.mix_floor)  # rejects a floor that is too high now, not in an hour
        self.reward = REWARDS[args.mix_reward](args, probe)
        self.policy = POLICIES[args.mix_policy](prior, **(args.mix_policy_settings or {}))
        self.smoothing = Smoothing(len(prior), args.mix_smoothing)
        self.mixes = [(0, prior.tolist())]  # in `mix_unit`; the sampler holds them in examples
        self.rewards = np.full(len(prior), np.nan)

    def mix_at(self, step: int) -> ndarray:
        """Returns the mix in force for the batch of an optimizer step, in `mix_unit`. Shape (domains,)."""
        if self.args.mix_shadow:
            return np.array(self.mixes[0][1])
        return np.array(next(mix for start, mix in reversed(self.mixes) if start <= step))

    def update(self, step: int) -> None:
        """Measures, learns, and sets the mix that takes effect `mix_delay` steps after `step`."""
        mix = self.mix_at(max(step - 1, 0))
        with np.errstate(all="ignore"):
            self.rewards = self.reward.measure()
        rewards = usable_rewards(self.rewards, mix, self.probe.domains)
        if rewards is None:
            return
        new = guarded(
            self.policy.update(self.smoothing.update(rewards), mix),
            floor=self.args.mix_floor,
            epochs=self.sampler.epochs(step)[: len(mix)],
            max_epochs=np.inf if self.args.mix_max_epochs is None else self.args.mix_max_epochs,
        )
        self._check_same_everywhere(new)
        start = step + self.args.mix_delay
        self.mixes.append((start, new.tolist()))
        if not self.args.mix_shadow:
            self.sampler.set_mix(self.in_examples(new), start)

    def metrics(self) -> dict[str, float]:
        """Returns what is logged: rewards as measured, and the mix that was learned last."""
        named = zip(self.probe.domains, self.rewards, self.mixes[-1][1], strict=True)
        values = {k: v for d, r, m in named for k, v in ((f"reward/{d}", r), (f"learned_mix/{d}", m))}
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def state_dict(self) -> dict:
        """Returns everything that the next update depends on, as JSON takes it."""
        return {
            "policy": self.policy.state_dict(),
            "smoothing": self.smoothing.state_dict(),
            "mixes": self.mixes,
            "rewards": self.rewards.tolist(),
            "baseline": None if self.reward.baseline is None else self.reward.baseline.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()`. The baseline is saved, because the model before the first step is gone."""
        self.policy.load_state_dict(state["policy"])
        self.smoothing.load_state_dict(state["smoothing"])
        self.mixes = [(start, mix) for start, mix in state["mixes"]]
        self.rewards = np.array(state["rewards"], float)
        self.reward.baseline = None if state["baseline"] is None else np.array(state["baseline"])

    def _check_same_everywhere(self, mix: ndarray) -> None:
        mixes = self.probe.gathered(mix)
        if not (mixes == mixes[0]).all():
            raise RuntimeError(
                f"Every process must draw from the same mix, but they have {mixes.tolist()}. Are versions and seeds the "
                f"same on all machines?"
            )
