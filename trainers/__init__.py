"""TRL trainers for the two stages of a fused model: the gate alone, then everything."""

from .gate_cache import CachedGateTrainer
from .sampling import DomainSampler
from .settings import GateStageConfig, JointStageConfig
from .stages import GateTrainer, JointTrainer


__all__ = ["CachedGateTrainer", "DomainSampler", "GateStageConfig", "GateTrainer", "JointStageConfig", "JointTrainer"]
