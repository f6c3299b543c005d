"""Makes the models of the study. What takes long is kept in the contender's folder, so that a killed run goes on."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from experiments.real.measuring import example_losses
from experiments.real.tuning import adapted
from experiments.real.workshop import RANK, Workshop
from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Reads
from modeling_ultrafuser.gates_ultrafuser import GATES
from trainers import CachedGateTrainer, DistilConfig, DistilTrainer, GateStageConfig, JointStageConfig, JointTrainer
from trainers.progress import ProgressOfTraining
from ultrafuser.atomic import write_json
from ultrafuser.merge import merge_method
from ultrafuser.merge.merged_model import lines_start, merge


PLAIN = {"bf16": False, "gradient_checkpointing": False, "max_length": 512, "mixed_share": 0.0}
PLAIN |= {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
FEW = 8  # conversations of each domain that say which factor a merge takes
LEARNED = "learned.pt"


def tuned(shop: Workshop, place: Path, **how):
    """Tunes one adapter of the base on some data."""
    return shop.single(shop.tuned(place, how))


def merged(shop: Workshop, place: Path, *, method: str, by_depth: bool = False):
    """Merges the adapters, with the factor, or the slope of LiNeS, that predicts what gates are trained on best."""
    base = shop.plain_base()
    models = {name: shop.single(path).cpu() for name, path in shop.adapters.items()}
    options = {"base": base, "seed": shop.seed}
    if by_depth:
        options["weight"] = lines_start(models, method, **options)

    def made(factor: float):
        varied = {"slope" if by_depth else "weight": factor}
        return merge(models, method, **options, **varied).to(shop.device)

    file = place / "factor.json"
    if not file.exists():
        rows = [row for rows in shop.gate_data().values() for row in rows[:FEW]]
        factors = (1.0,) if not (by_depth or merge_method(method).needs_base) else (1 / len(models), 0.75, 1.0)
        write_json(file, {"factor": min(factors, key=lambda f: _loss(made(f), shop, rows))})
    return made(json.loads(file.read_text())["factor"])


def _loss(model, shop: Workshop, rows: list[dict]) -> float:
    return sum(loss for loss, _ in example_losses(model, shop.tokenizer, rows))


def distilled(
    shop: Workshop, place: Path, *, teacher: dict, domains: list[str], steps: int, rate: float, by_label: bool = False
):
    """Teaches one new adapter of the base by a fused model, or by the specialist of each domain, on given answers."""
    student = adapted(str(shop.base), RANK).to(shop.device)
    learning = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    stage = {"max_steps": steps, "learning_rate": rate, "by_label": by_label}
    with shop.lock(place):
        _learned(
            place,
            lambda: learning,
            lambda: _distil(shop, place, student, model_of(shop, place, teacher), domains, stage),
        )
    return student.merge_and_unload().eval()


def _distil(shop: Workshop, place: Path, student, taught, domains: list[str], stage: dict) -> None:
    settings = {"save_strategy": "no", "use_cpu": shop.device == "cpu", "seed": shop.seed, **PLAIN, **stage}
    settings |= {"off_policy": True, "examples_per_domain": 2, "per_device_train_batch_size": len(domains)}
    arguments = DistilConfig(str(place / "stage"), **settings)
    data = {name: rows for name, rows in shop.as_datasets().items() if name in domains}
    trainer = DistilTrainer(student, taught, arguments, data, processing_class=shop.tokenizer)
    trainer.add_callback(ProgressOfTraining("distilling"))
    trainer.train()


def uniform(shop: Workshop, place: Path, *, fusion: str):
    """Fuses all specialists with equal weights."""
    return _new(shop, "uniform", fusion).eval().to(shop.device)


def fused(shop: Workshop, place: Path, *, gate: str, fusion: str, stage: dict, joint: dict | None = None):
    """Trains a fused model in stage one; with `joint`, in stage two as well."""
    first = shop.place({"make": "gate", "gate": gate, "fusion": fusion, "stage": stage}, True)
    model = _new(shop, gate, fusion)
    with shop.lock(first):
        _learned(first, model.model.fusion_gate.named_parameters, lambda: _stage_one(shop, first, model, stage))
    if joint is not None:
        model.model.reader.train_only(model, model.config.specialist_names)
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        _learned(place, lambda: learning, lambda: _stage_two(shop, place, model, joint))
    model.config.use_cache = True
    return model.requires_grad_(False).eval().to(shop.device)


def _new(shop: Workshop, gate: str, fusion: str) -> UltraFuserForCausalLM:
    set_seed(shop.seed)
    return UltraFuserForCausalLM.from_specialists(
        shop.sources(), base=str(shop.base), gate=gate, fusion=fusion, dtype="float32"
    )


def _learned(
    place: Path, parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]], train: Callable[[], None]
) -> None:
    """Trains, or takes what was learned from the folder."""
    file = place / LEARNED
    if file.exists():
        found = torch.load(file, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, parameter in parameters():
                parameter.copy_(found[name])
        return
    train()
    partial = file.with_suffix(".partial")
    torch.save({name: p.detach().cpu().clone() for name, p in parameters()}, partial)
    partial.rename(file)
    # checkpoints are as large as the model
    shutil.rmtree(place / "stage", ignore_errors=True)


def _stage_one(shop: Workshop, place: Path, model: UltraFuserForCausalLM, stage: dict) -> None:
    data = shop.as_datasets()
    settings = {"save_strategy": "no", "use_cpu": shop.device == "cpu", "seed": shop.seed, **PLAIN, **_batch(stage)}
    arguments = GateStageConfig(str(place / "stage"), **settings)
    keep = stage.get("keep", "hidden")
    past = Reads.PAST in GATES[model.config.gate].reads
    where = {"cache": _cache(shop, keep, past), "keep": keep}
    trainer = CachedGateTrainer(model, arguments, data, processing_class=shop.tokenizer, **where)
    trainer.add_callback(ProgressOfTraining("stage one"))
    trainer.train()


def _batch(stage: dict) -> dict:
    settings = {name: value for name, value in stage.items() if name != "keep"}
    return {"per_device_train_batch_size": 8, **settings}


def _cache(shop: Workshop, keep: str, past: bool) -> Path:
    """Names the folder of the specialists' states. One that holds evidence serves gates that read none as well."""
    place = shop.place({"make": "cache", "keep": keep, "past": True}, False)
    return place if past or (place / "cache.json").exists() else shop.place({"make": "cache", "keep": keep}, False)


def _stage_two(shop: Workshop, place: Path, model: UltraFuserForCausalLM, joint: dict) -> None:
    settings = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 1, "seed": shop.seed}
    settings |= {"use_cpu": shop.device == "cpu", **PLAIN, **_batch(joint)}
    arguments = JointStageConfig(str(place / "stage"), **settings)
    trainer = JointTrainer(model, arguments, shop.as_datasets(), processing_class=shop.tokenizer)
    trainer.add_callback(ProgressOfTraining("stage two"))
    begun = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=begun)


def model_of(shop: Workshop, place: Path, contender: dict):
    """Makes the model of a contender: `make`, a name in `MAKERS`, and its settings."""
    how = {name: value for name, value in contender.items() if name != "make"}
    return MAKERS[contender["make"]](shop, place, **how)


MAKERS = {"tuned": tuned, "merge": merged, "uniform": uniform, "fused": fused, "distilled": distilled}
SEEDED = {"tuned", "merge", "fused", "distilled"}
