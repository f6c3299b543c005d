"""Learning rates of the parts of a fused model: gate, heads and specialists."""

from collections.abc import Mapping

from torch import Tensor, nn, tensor
from torch.optim import Optimizer


PARTS = ("gate", "heads", "specialists")


def set_rates(optimizer: Optimizer, model: nn.Module, rates: Mapping[str, float | None]) -> None:
    """Splits an optimizer's parameter groups by part, and sets each part's learning rate.

    Args:
        optimizer: Of the model's parameters, before its first step.
        model: The fused model, or a PEFT model around it.
        rates: Part to learning rate. None, or a part left out: as it is. Without any rate, nothing is split.
    """
    if all(rate is None for rate in rates.values()):
        return
    part_of = {id(p): _part(n) for n, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for part in PARTS:
            chosen = [p for p in group["params"] if part_of[id(p)] == part]
            if chosen:
                groups.append({**group, "params": chosen, "lr": _rate(group["lr"], rates.get(part))})
    optimizer.param_groups[:] = groups


def _rate(before: float | Tensor, rate: float | None) -> float | Tensor:
    rate = before if rate is None else rate
    # compiled optimizers keep a tensor, and schedules write into it: one for each group
    return tensor(float(rate)) if isinstance(before, Tensor) else rate


def _part(name: str) -> str:
    return "gate" if "fusion_gate" in name else "heads" if "lm_head" in name else "specialists"
