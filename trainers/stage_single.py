"""One ordinary model on several domains: Mixture-of-Skills as its paper has it (Wu et al., 2024, arXiv 2406.08811)."""

from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel

from .forward_hooks import capture_single
from .mix.rewards import REWARDS
from .stage_base import StageTrainer
from .stage_checks import loaded
from .stage_config import SingleStageConfig, scaled_rate


OF_GATES = ("gate_entropy", "gate_balance", "gate_domain", "gate_dropout", "gate_scale")


class SingleTrainer(StageTrainer):
    """Trains one model that is not fused, with domains, mixes, rewards, policies and resuming as the stages have them.

    With `peft_config` it learns through adapters. Rewards that compare domains with their specialists are rejected.
    """

    config_class = SingleStageConfig
    stage = "single"

    def _checked(self, model: PreTrainedModel | str, args: SingleStageConfig) -> PreTrainedModel:
        model = loaded(model, args, self.config_class, type(self).__name__)
        if model.config.model_type == "ultrafuser":
            raise ValueError(
                "SingleTrainer trains one ordinary model, but got a fused one. Train it with `GateTrainer`, then "
                "`JointTrainer`; or take a specialist: `model.specialist(name)`."
            )
        if given := [name for name in OF_GATES if getattr(args, name)]:
            raise ValueError(f"{given} are settings of a gate, which a single model has not. Leave them out.")
        if args.mix_reward in REWARDS and REWARDS[args.mix_reward].needs_specialists:
            others = [name for name, reward in REWARDS.items() if not reward.needs_specialists]
            raise ValueError(
                f"mix_reward={args.mix_reward!r} compares each domain with its specialist, and a single model has none. "
                f"Choose one of {others}."
            )
        return model

    def _fill_in(self, args: SingleStageConfig, model: PreTrainedModel, adds_terms: bool) -> None:
        args.mixed_share, args.gate_dropout, args.gate_scale = args.mixed_share or 0.0, 0.0, 0.0

    def _gate_tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {}

    def _prepare_model(self, gate: dict[str, Tensor]) -> None:
        self.fused = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _choose_parameters(self, model: PreTrainedModel, args: SingleStageConfig, peft_config) -> None:
        if peft_config is None:
            model.requires_grad_(True)

    def watch(self, **kept: bool) -> AbstractContextManager[dict]:
        """As every stage's, of a model without a gate."""
        return capture_single(self.fused, **kept)

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        return scaled_rate(sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()), 3e-4)
