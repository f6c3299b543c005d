"""TRL trainers for a fused model: its gate alone, then everything; for one model that learns from it; for a single model."""

import importlib


_MODULES = {
    "CachedGateTrainer": "gate_cache",
    "DistilConfig": "distil_config",
    "DistilTrainer": "distil_trainer",
    "GateStageConfig": "stage_config",
    "GateTrainer": "stage_gate",
    "JointStageConfig": "stage_config",
    "JointTrainer": "stage_joint",
    "SingleStageConfig": "stage_config",
    "SingleTrainer": "stage_single",
    "StratifiedSampler": "samplers.sampler_stratified",
}
__all__ = [*_MODULES]


def __getattr__(name: str):
    # TRL takes many seconds to import, and not every module of this package needs it
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
