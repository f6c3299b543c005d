"""Stage one: the gate alone."""

from transformers import PreTrainedModel

from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE

from .settings import GateStageConfig, scaled_rate
from .stage_base import StageTrainer, specialist_size


class GateTrainer(StageTrainer):
    """Stage one: trains the gate and leaves every specialist as it is.

    The specialists run without autograd, so no activations of theirs are kept.
    """

    config_class = GateStageConfig
    stage = "gate"

    def _choose_parameters(self, model: PreTrainedModel, args: GateStageConfig, peft_config) -> None:
        if not list(model.model.fusion_gate.parameters()):
            raise ValueError(
                f"Stage one trains the gate, but gate={model.config.gate!r} has no parameters: there is nothing to train. Use "
                f"the model as it is, or fuse with another gate, {DEFAULT_GATE!r} say."
            )
        if peft_config is not None:
            raise ValueError("Stage one trains the gate alone, so there is nothing to adapt. Give LoRA to stage two.")
        model.requires_grad_(False)
        model.model.fusion_gate.requires_grad_(True)

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        return scaled_rate(specialist_size(model), model.model.fusion_gate.learning_rate)
