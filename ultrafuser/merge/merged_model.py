"""Merges specialists into one model, by PEFT's merge utilities."""

import copy
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import merge_method
from .coefficients import Coefficients, check_layers
from .merge_base import Merge, NotMergeableError


def merge(
    specialists: dict[str, PreTrainedModel],
    method: str,
    *,
    base: PreTrainedModel | None = None,
    weight: float = 1.0,
    slope: float = 0.0,
    coefficients: Coefficients | None = None,
    inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Merges specialists into one model of their shape.

    With base weights b and specialists s_k, a merge works on the changes s_k - b. A slope makes the factor of layer l of L
    `weight` + `slope` l / (L - 1), l from 0; all else keeps `weight`. That is LiNeS, as its authors compute it (Wang et al.,
    2025, https://arxiv.org/abs/2410.17146), with `lines_start` as `weight`.

    Args:
        specialists: By name, all of one shape.
        method: A name in `MERGES`; a colon and its setting, if it has one, as in "ties:0.2".
        base: The model that all were tuned from. "average", "regmean" and "layer_swap" do without.
        weight: Factor of every change.
        slope: By how much the last layer's factor is above the first one's.
        coefficients: Factors by row and specialist, in place of `weight` and `slope`.
        inputs: By specialist and linear layer, `inner_products` of its inputs, for a merge that reads them.
        seed: Of what DARE drops.

    Raises:
        NotMergeableError: If the shapes or positions differ, a base or inputs are needed and missing, or the merge does not
            fit these specialists.
    """
    chosen = merge_method(method)
    _check_based(base, chosen.needs_base or slope != 0)
    models = {**specialists, **({"the base": base} if base is not None else {})}
    _check_mergeable(models)
    states = [m.state_dict() for m in specialists.values()]
    # a merge that needs no base gives the same from any
    start = states[0] if base is None else base.state_dict()
    layers = next(iter(specialists.values())).config.get_text_config(decoder=True).num_hidden_layers
    names = list(specialists)
    table = chosen.table(names, layers) or coefficients or Coefficients.lines(names, layers, weight, slope)
    if not table.is_even:
        check_layers(start, layers)
    model = copy.deepcopy(next(iter(specialists.values())))
    # tied tensors have one name here
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for key, target in model.state_dict().items():
        if key not in once:
            continue
        torch.manual_seed(seed_of(seed, key))
        tensors = [s[key].to(target.device) for s in states]
        own = inputs_of(chosen, names, key, inputs)
        target.copy_(chosen.merged(start[key].to(target.device), tensors, table.of(key), own))
    return model.eval()


def seed_of(seed: int, key: str) -> int:
    """Returns the seed of what is random of one parameter, whatever the order in which they are merged."""
    return zlib.crc32(f"{seed} {key}".encode())


def inputs_of(
    chosen: Merge, names: list[str], key: str, inputs: Mapping[str, Mapping[str, Tensor]] | None
) -> list[Tensor] | None:
    """Returns the inner products of a linear layer's inputs under each specialist; None of any other parameter.

    Raises:
        NotMergeableError: If the merge reads them, and there are none.
    """
    if not chosen.reads_inputs:
        return None
    if inputs is None:
        raise NotMergeableError(
            "RegMean fits layers to what they return on rows of each specialist's domain, but there are no rows. Pass some."
        )
    layer = key.removesuffix(".weight")
    return [inputs[name][layer] for name in names] if layer in inputs[names[0]] else None


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


def _check_based(base: PreTrainedModel | None, needed: bool) -> None:
    if base is None and needed:
        raise NotMergeableError(
            "Merges other than the plain average work on what each specialist changed, but no base was given. Pass the "
            "model that all specialists were tuned from: --base, or `base` in Python."
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
