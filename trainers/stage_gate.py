"""Stage one: the gate alone."""

from transformers import PreTrainedModel

from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE
from modeling_ultrafuser.log_ultrafuser import print_line

from .stage_base import StageTrainer, specialist_size
from .stage_config import GateStageConfig, scaled_rate


LITTLE = 10_000  # tokens of a domain: with fewer the linear gate was ahead, see "How long to train a gate" in EXPERIMENTS.md


class GateTrainer(StageTrainer):
    """Stage one: trains the gate and leaves every specialist as it is.

    The specialists run without autograd, so no activations of theirs are kept.
    """

    config_class = GateStageConfig
    stage = "gate"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.fused.model.fusion_gate.has_width and self.args.should_log and (short := self._short_domains()):
            print_line(
                f"The domains {short} have fewer than {LITTLE:,} tokens each. With so little text the gate 'linear+calibration' "
                f"may learn more than {self.fused.config.gate!r}: `ultrafuser gates` tells."
            )

    def _short_domains(self) -> list[str]:
        """Returns the domains with fewer than `LITTLE` tokens."""
        left = dict.fromkeys(self.domains, LITTLE)
        if "input_ids" not in self.train_dataset.column_names:
            return []
        for row in self.train_dataset.with_format(None):
            if row["domain"] in left:
                left[row["domain"]] -= len(row["input_ids"])
                if left[row["domain"]] <= 0:
                    del left[row["domain"]]
            if not left:
                break
        return sorted(left)

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
