"""TRL trainers for the two stages of a fused model: the gate alone, then everything."""

from .sampling import BalancedSampler
from .stages import GateTrainer, JointTrainer


__all__ = ["BalancedSampler", "GateTrainer", "JointTrainer"]
