"""Settings of the mix: which domain is drawn how often, and how a mix is learned."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..samplers import SAMPLERS
from .mixes import MIXES
from .policies import POLICIES
from .rewards import REWARDS


MIX_UNITS = ("example", "token", "supervised")


@dataclass
class MixConfig:
    """Settings of the mix, which a stage's settings include."""

    mix: str = field(
        default="balanced",
        metadata={"help": f"How often each domain is drawn: {', '.join(MIXES)}. A learned mix starts from it."},
    )
    sampler: str = field(
        default="stratified", metadata={"help": f"How a batch is drawn from the domains: {', '.join(SAMPLERS)}."}
    )
    mix_temperature: float = field(default=10.0, metadata={"help": "For mix='temperature': 1 is proportional."})
    mix_weights: dict | str | None = field(
        default=None, metadata={"help": "For mix='fixed': domain to weight, on any scale."}
    )
    mix_unit: str = field(
        default="example", metadata={"help": "Unit of the mix's shares: example, token, or supervised (tokens)."}
    )
    mix_reward: str | None = field(
        default=None,
        metadata={"help": f"Learn the mix from this reward: {', '.join(REWARDS)}. Default: do not learn."},
    )
    mix_policy: str = field(default="rate", metadata={"help": f"How the mix follows rewards: {', '.join(POLICIES)}."})
    mix_policy_settings: dict | str | None = field(default=None, metadata={"help": "Settings of the policy by name."})
    mix_every: int = field(default=100, metadata={"help": "Optimizer steps between two updates of the mix."})
    mix_delay: int = field(
        default=2, metadata={"help": "Optimizer steps until an update takes effect: more than the loaders read ahead."}
    )
    mix_probe: int = field(
        default=64, metadata={"help": "Training examples per domain for rewards that need passes of their own."}
    )
    mix_smoothing: float = field(default=0.9, metadata={"help": "Share of the new reward in the smoothed one."})
    mix_target: str | None = field(default=None, metadata={"help": "A domain to specialise in (MoSpec)."})
    mix_floor: float = field(default=0.05, metadata={"help": "Smallest share of any domain in a learned mix."})
    mix_max_epochs: float | None = field(
        default=None, metadata={"help": "How often a domain may be seen whole before a learned mix leaves it out."}
    )
    mix_shadow: bool = field(default=False, metadata={"help": "Learn and log the mix, and draw as if it were not."})
    mix_importance: bool = field(
        default=False, metadata={"help": "Weigh losses so that all domains count alike, however often each is drawn."}
    )

    def check_mix(self) -> None:
        """Checks the settings of the mix.

        Raises:
            ValueError: If one is unknown, out of range, or has no effect with the others.
        """
        kinds = {"mix": MIXES, "sampler": SAMPLERS, "mix_unit": MIX_UNITS, "mix_policy": POLICIES}
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {sorted(known)}, but is {getattr(self, name)!r}.")
        check_counts(self, ("mix_every", "mix_delay", "mix_probe"))
        if self.mix_reward is not None:
            self._check_reward()
        elif self.mix_target or self.mix_shadow or self.mix_policy_settings:
            raise ValueError(
                "`mix_target`, `mix_shadow` and `mix_policy_settings` say how a mix is learned, but `mix_reward` is None. "
                f"Choose one of {sorted(REWARDS)}."
            )

    def _check_reward(self) -> None:
        if self.mix_reward not in REWARDS:
            raise ValueError(f"`mix_reward` must be one of {sorted(REWARDS)} or None, but is {self.mix_reward!r}.")
        raw = REWARDS[self.mix_reward].is_loss and self.mix_smoothing == 1
        if POLICIES[self.mix_policy].reads_losses and not raw:
            losses = [name for name, reward in REWARDS.items() if reward.is_loss]
            raise ValueError(
                f"mix_policy={self.mix_policy!r} follows losses as they are, but mix_reward={self.mix_reward!r} and "
                f"mix_smoothing={self.mix_smoothing}. Set mix_reward={' or '.join(map(repr, losses))} and mix_smoothing=1."
            )


def check_counts(settings, names: Iterable[str]) -> None:
    """Raises a ValueError if one of the named settings is a number below 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
