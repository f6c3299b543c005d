"""Merges specialists into one model, by PEFT's merge utilities."""

import copy
import re

import torch
from transformers import PreTrainedModel

from . import merge_method


class NotMergeableError(ValueError):
    """These specialists cannot be merged that way; the message says why."""


def merge(
    specialists: dict[str, PreTrainedModel],
    method: str,
    *,
    base: PreTrainedModel | None = None,
    weight: float = 1.0,
    slope: float = 0.0,
    seed: int = 0,
) -> PreTrainedModel:
    """Merges specialists into one model of their shape.

    With base weights b and specialists s_k, a merge works on the changes s_k - b. A slope makes the factor of layer l of L
    `weight` + `slope` l / (L - 1), l from 0; all else keeps `weight`. That is LiNeS, as its authors compute it (Wang et al.,
    2025, https://arxiv.org/abs/2410.17146), with `lines_start` as `weight`.

    Args:
        specialists: By name, all of one shape.
        method: A name in `MERGES`; a colon and its setting, if it has one, as in "ties:0.2".
        base: The model that all were tuned from. Only the plain average does without.
        weight: Factor of every change.
        slope: By how much the last layer's factor is above the first one's.
        seed: Of what DARE drops.

    Raises:
        NotMergeableError: If the shapes or positions differ, or a base is needed and missing.
    """
    chosen = merge_method(method)
    _check_based(base, chosen.needs_base or slope != 0)
    models = {**specialists, **({"the base": base} if base is not None else {})}
    _check_mergeable(models)
    states = [m.state_dict() for m in specialists.values()]
    # the average needs no base: any would do
    start = states[0] if base is None else base.state_dict()
    layers = next(iter(specialists.values())).config.get_text_config(decoder=True).num_hidden_layers
    torch.manual_seed(seed)
    model = copy.deepcopy(next(iter(specialists.values())))
    targets = model.state_dict()
    for key, origin in start.items():
        # 16 bits are too coarse for small changes
        origin = origin.to(targets[key].device, torch.float32)
        changes = [s[key].float() - origin for s in states]
        factor = weight + slope * _depth(key, layers)
        weights = torch.full((len(changes),), factor, device=origin.device)
        targets[key].copy_(origin + chosen.combined(changes, weights))
    return model.eval()


def lines_start(
    specialists: dict[str, PreTrainedModel], method: str, *, base: PreTrainedModel | None, seed: int = 0
) -> float:
    """Returns the factor at which LiNeS starts: 1 over the number of specialists, times what the merge takes from the sum.

    That is |sum of changes| / |merged change| / N in the 1-norm, as in its authors' code.

    Args:
        specialists: As for `merge`.
        method: As for `merge`.
        base: As for `merge`.
        seed: As for `merge`.

    Raises:
        NotMergeableError: As `merge` does.
    """
    norms = [_distance(merge(specialists, how, base=base, seed=seed), base) for how in ("task_arithmetic", method)]
    return norms[0] / max(norms[1], torch.finfo(torch.float32).tiny) / len(specialists)


def _distance(model: PreTrainedModel, base: PreTrainedModel) -> float:
    other = base.state_dict()
    return sum(
        (t.double() - other[key].to(t.device).double()).abs().sum().item() for key, t in model.state_dict().items()
    )


def _depth(key: str, layers: int) -> float:
    """Returns where a parameter's layer lies between the first, 0, and the last, 1; 0 outside of the layers."""
    layer = re.search(r"\.layers?\.(\d+)\.|\.h\.(\d+)\.", key)
    return int(layer[1] or layer[2]) / max(layers - 1, 1) if layer else 0.0


def _check_based(base: PreTrainedModel | None, needed: bool) -> None:
    if base is None and needed:
        raise NotMergeableError(
            "Merges other than the plain average work on what each specialist changed, but no base was given. Pass the "
            "model that all specialists were tuned from."
        )


def _check_mergeable(models: dict[str, PreTrainedModel]) -> None:
    (first_name, first), *others = models.items()
    shapes = {key: tuple(t.shape) for key, t in first.state_dict().items()}
    for name, model in others:
        own = {key: tuple(t.shape) for key, t in model.state_dict().items()}
        odd = next((key for key in sorted({*shapes, *own}) if shapes.get(key) != own.get(key)), None)
        if odd is not None:
            raise NotMergeableError(
                f"A merge adds up weights, so all models must have one shape, but `{odd}` is {shapes.get(odd)} in "
                f"{first_name!r} and {own.get(odd)} in {name!r}. Fuse them instead, which needs one tokenizer only."
            )
        for field in ("rope_parameters", "rope_theta"):
            theirs, ours = (getattr(m.config, field, None) for m in (model, first))
            if theirs != ours:
                raise NotMergeableError(
                    f"A merge adds up weights that must mean the same, but `{field}` is {ours} in {first_name!r} and "
                    f"{theirs} in {name!r}: attention that was trained for other positions. Fuse them instead."
                )
