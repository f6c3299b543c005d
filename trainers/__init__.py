"""TRL trainers for the two stages of a fused model: the gate alone, then everything."""

from .sampling import DomainSampler
from .settings import GateStageConfig, JointStageConfig
from .stages import GateTrainer, JointTrainer


__all__ = ["DomainSampler", "GateStageConfig", "GateTrainer", "JointStageConfig", "JointTrainer"]
