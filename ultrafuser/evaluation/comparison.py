"""Is fusing worth it? A fused model against every baseline that the same specialists allow, on the same tokens."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.safetensors_ultrafuser import read_header
from trainers.progress import Progress

from ..atomic import write_json
from ..merge.merge_base import NotMergeableError
from ..provenance import digest
from .contenders import FUSED, Comparison, Measured, UntunedError, best_per_domain, contenders
from .measurement import MIXED, HeldOut, Scores
from .resampling import calibration_error, flips, interval, per_example, permutation_test


SCORES = "scores"  # folder of what is finished
BIN = 16  # tokens in each bin of the gate weights by position


def compare_models(
    comparison: Comparison,
    out: Path,
    *,
    more: Mapping[str, Callable[[], PreTrainedModel]] | None = None,
    identity: dict | None = None,
) -> dict:
    """Measures a fused model and its baselines, each once: what `out` holds already is not measured again.

    Args:
        comparison: The fused model, its specialists, and what to measure on. A domain named "mixed" is reported, but kept
            out of the means.
        out: Folder for the scores of every contender (`scores/`).
        more: Further contenders by name, each loaded when its turn comes.
        identity: What the run is about, in JSON: a folder that holds another run's scores is refused.

    Returns:
        Rows best first, what could not be compared and why, and the gate's statistics.

    Raises:
        ValueError: If `out` holds the scores of another run, or two contenders have one name.
    """
    plan = contenders(comparison)
    for name, load in (more or {}).items():
        if slug(name) in map(slug, plan):
            raise ValueError(
                f"Every row has a name and a file of scores of its own, but {name!r} is, or is written like, one of "
                f"{list(plan)}. Choose another name."
            )
        plan[name] = partial(_further, comparison, load)
    _check_identity(out, identity or {})
    files, left_out = _file_names(plan), {}
    with Progress("comparing", len(plan)) as progress:
        for name, measure in plan.items():
            try:
                comparison.found[name] = _kept(out / SCORES / f"{files[name]}.safetensors", measure)
            except (NotMergeableError, UntunedError) as error:
                left_out[name] = str(error)
            progress.add()
    return {
        "domains": list(comparison.data),
        "specialists": list(comparison.specialists),
        "seed": comparison.seed,
        "examples": {domain: len(examples) for domain, examples in comparison.data.items()},
        "skipped": {domain: examples.skipped for domain, examples in comparison.data.items()},
        "rows": table_rows(comparison),
        "left_out": left_out,
        "gate": gate_statistics(comparison.fused, comparison.data),
    }


def _further(comparison: Comparison, load: Callable[[], PreTrainedModel]) -> Measured:
    model = load()
    return comparison.run(model, "fused" if model.config.model_type == "ultrafuser" else "trained")


def slug(name: str) -> str:
    """A file name for a row's name."""
    return re.sub(r"\W+", "_", name).strip("_").lower()


def _file_names(rows: Iterable[str]) -> dict[str, str]:
    """A file name for each row: names that differ in case alone, or that are very long, have a fingerprint, too."""
    names = {}
    for row in rows:
        name = slug(row)
        names[row] = f"{name[:80]}_{digest(row)}" if name in names.values() or len(name) > 100 else name
    return names


def table_rows(comparison: Comparison) -> list[dict]:
    """One row per contender, best mean loss first: losses, how sure they are, what changed for the specialist's owner.

    `difference` is to the fused model: negative means that fusing loses. Flips and retention are against each domain's
    best specialist, by the mean over domains.
    """
    data, found, seed = comparison.data, comparison.found, comparison.seed
    domains = [d for d in data if d != MIXED]
    sums = {name: {d: per_example(m.scores[d], x) for d, x in data.items()} for name, m in found.items()}
    right = best_specialists(comparison)
    rows = []
    for name, measured in found.items():
        own, scores = sums[name], measured.scores
        loss = {d: float(own[d][0].sum() / own[d][1].sum()) for d in own}
        paired = [(own[d][0] - sums[FUSED][d][0], own[d][1]) for d in domains]
        changed = [flips(scores[d], found[right[d]].scores[d], data[d]) for d in domains]
        row = {
            "name": name,
            "kind": measured.kind,
            "loss": loss,
            "loss_interval": {d: interval([own[d]], seed=seed) for d in own},
            "mean": _mean([loss[d] for d in domains]),
            "mean_interval": interval([own[d] for d in domains], seed=seed),
            "difference": _mean([float(s.sum() / n.sum()) for s, n in paired]),
            "difference_interval": interval(paired, seed=seed),
            "p": permutation_test(paired, seed=seed),
            "accuracy": {d: scores[d].correct[x.scored].float().mean().item() for d, x in data.items()},
            "calibration_error": {d: calibration_error(scores[d], x) for d, x in data.items()},
            **{key: _mean([c[key] for c in changed]) for key in changed[0]},
            "cost": measured.cost,
        }
        if MIXED in own:
            difference = [(own[MIXED][0] - sums[FUSED][MIXED][0], own[MIXED][1])]
            row |= {"mixed_difference_interval": interval(difference, seed=seed)}
        rows.append(row | ({"note": measured.note} if measured.note else {}))
    return sorted(rows, key=lambda row: row["mean"])


def best_specialists(comparison: Comparison) -> dict[str, str]:
    """For each domain the name of the row of its best specialist."""
    names = list(comparison.specialists)
    chosen = {d: best_per_domain(comparison.alone(d), examples)[0] for d, examples in comparison.data.items()}
    return {domain: f"{names[best]} specialist" for domain, best in chosen.items()}


@torch.inference_mode()
def gate_statistics(model: UltraFuserForCausalLM, data: Mapping[str, HeldOut], batch_size: int = 16) -> dict:
    """Who speaks where: mean weights by domain and by position, and the mean entropy of the weights in nats.

    Signed weights have no entropy: it is that of their absolute values' shares.
    """
    names = model.config.specialist_names
    found = {"mean_weights": {}, "weights_by_position": {}, "bin_tokens": BIN, "entropy": {}}
    for domain, examples in data.items():
        batches = zip(examples.input_ids.split(batch_size), examples.attention_mask.split(batch_size), strict=True)
        weights = torch.cat(
            [model.gate_weights(ids.to(model.device), attention_mask=m.to(model.device)).cpu() for ids, m in batches]
        )
        kept = examples.attention_mask.bool()
        mean = weights[kept].mean(0)
        found["mean_weights"][domain] = dict(zip(names, mean.tolist(), strict=True))
        found["entropy"][domain] = torch.special.entr(_shares(model, weights[kept])).sum(-1).mean().item()
        bins = zip(weights.split(BIN, dim=1), kept.split(BIN, dim=1), strict=True)
        found["weights_by_position"][domain] = [w[k].mean(0).tolist() for w, k in bins if k.any()]
    return found


def _shares(model: UltraFuserForCausalLM, weights: torch.Tensor) -> torch.Tensor:
    if model.config.signed_weights is None:
        return weights
    return weights.abs() / weights.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _check_identity(out: Path, identity: dict) -> None:
    file = out / SCORES / "run.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, identity)
        return
    kept, asked = read_json(file), json.loads(json.dumps(identity))
    odd = [key for key in sorted({*kept, *asked}) if kept.get(key) != asked.get(key)]
    if odd:
        told = "; ".join(_difference(key, kept.get(key), asked.get(key)) for key in odd)
        raise Refusal(
            f"{str(out)!r} holds parts of another run, with other {told}",
            "Finished parts are only taken up by the run that made them",
            "Choose another folder, or delete that one.",
        )


def _difference(key: str, there: object, here: object) -> str:
    """Names what differs: values as they are, and the parts of a dict, which are hashes, by their names."""
    if isinstance(there, dict) and isinstance(here, dict):
        return f"{key} of {sorted(name for name in {*there, *here} if there.get(name) != here.get(name))}"
    return f"{key} ({there!r} there, {here!r} here)"


def _kept(file: Path, make: Callable[[], Measured]) -> Measured:
    """Scores from a file, or made and written there whole."""
    if file.exists():
        read_header(file)
        with safe_open(file, "pt") as saved:
            meta = {key: json.loads(value) for key, value in saved.metadata().items()}
            domains = meta.pop("domains")
            scores = {d: Scores(*(saved.get_tensor(f"{d}/{field}") for field in Scores._fields)) for d in domains}
        return Measured(scores=scores, **meta)
    measured = make()
    meta = {"kind": measured.kind, "cost": measured.cost, "note": measured.note, "domains": list(measured.scores)}
    tensors = {f"{d}/{f}": t.contiguous() for d, s in measured.scores.items() for f, t in s._asdict().items()}
    part = file.with_suffix(".part")
    save_file(tensors, part, {key: json.dumps(value) for key, value in meta.items()})
    os.replace(part, file)
    return measured


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
