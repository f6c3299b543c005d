"""Merges specialists into one model, by PEFT's merge utilities."""

import copy
import re

import torch
from transformers import PreTrainedModel

from . import MERGES


class NotMergeableError(ValueError):
    """These specialists cannot be merged that way; the message says why."""


def merge(
    specialists: dict[str, PreTrainedModel],
    method: str,
    *,
    base: PreTrainedModel | None = None,
    weight: float = 1.0,
    by_depth: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Merges specialists into one model of their shape.

    With base weights b and specialists s_k, a merge works on the changes s_k - b.

    Args:
        specialists: By name, all of one shape.
        method: A name in `MERGES`.
        base: The model that all were tuned from. Only the plain average does without.
        weight: Factor of every change.
        by_depth: Whether the factor rises linearly with depth, from `weight` over the number of specialists at the
            embeddings to `weight` behind the last layer, as in LiNeS (Wang et al., 2025, arXiv 2410.17146).
        seed: Of what DARE drops.

    Raises:
        NotMergeableError: If the shapes or positions differ, or a base is needed and missing.
    """
    if method not in MERGES:
        raise ValueError(f"Unknown merge {method!r}. Choose one of {sorted(MERGES)}.")
    if base is None and (MERGES[method].needs_base or by_depth):
        raise NotMergeableError(
            "Merges other than the plain average work on what each specialist changed, but no base was given. Pass the "
            "model that all specialists were tuned from."
        )
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
        factor = weight * (_depth_factor(key, layers, len(states)) if by_depth else 1.0)
        targets[key].copy_(
            origin + MERGES[method].combined(changes, torch.full((len(changes),), factor, device=origin.device))
        )
    return model.eval()


def _depth_factor(key: str, layers: int, specialists: int) -> float:
    layer = re.search(r"\.layers?\.(\d+)\.|\.h\.(\d+)\.", key)
    if layer:
        depth = (int(layer[1] or layer[2]) + 1) / (layers + 1)
    else:
        depth = 0.0 if "embed" in key or ".wte." in key else 1.0
    return 1 / specialists + (1 - 1 / specialists) * depth


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
