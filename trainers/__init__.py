"""TRL trainers for the two stages of a fused model: the gate alone, then everything."""

import importlib


_MODULES = {
    "CachedGateTrainer": "gate_cache",
    "GateStageConfig": "stage_config",
    "GateTrainer": "stage_gate",
    "JointStageConfig": "stage_config",
    "JointTrainer": "stage_joint",
    "StratifiedSampler": "samplers.sampler_stratified",
}
__all__ = [*_MODULES]


def __getattr__(name: str):
    # TRL takes many seconds to import, and not every module of this package needs it
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
