"""TRL trainers for the two stages of a fused model: the gate alone, then everything."""

from .sampling import DomainSampler
from .stages import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer


__all__ = ["DomainSampler", "GateStageConfig", "GateTrainer", "JointStageConfig", "JointTrainer"]
