"""Stage two: gate and specialists together."""

import difflib
import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .serial import SerialBackward
from .stage_base import StageTrainer, specialist_size
from .stage_config import JointStageConfig, scaled_rate


# of a fused model, with a learning rate each
PARTS = ("gate", "heads", "specialists")


class JointTrainer(StageTrainer):
    """Stage two: trains the gate and the specialists together, from where stage one ended.

    With `peft_config` the specialists learn through adapters and only those and the gate move. So it is where the
    specialists are adapters of one base: base and head stay as they are.
    """

    config_class = JointStageConfig
    stage = "joint"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not all(self._trained) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"`train_specialists={self.args.train_specialists}` keeps columns of the wide head as they are, which "
                f"takes a whole head, but FSDP and DeepSpeed give each process a part. Train all, or use DDP."
            )
        if self.serial is not None and (self.args.world_size > 1 or self.is_fsdp_enabled):
            raise ValueError(
                "`one_specialist_at_a_time` is for one process, because several exchange the gradients of all "
                f"specialists at once and hold them until then, but this is one of {self.args.world_size}. Leave it out, "
                "and shard with FSDP2 where memory is short."
            )

    def _begin(self) -> None:
        super()._begin()
        serial = self.args.one_specialist_at_a_time
        self.serial = SerialBackward(self.model, self.fused, self.args.max_grad_norm) if serial else None

    def _choose_parameters(self, model: PreTrainedModel, args: JointStageConfig, peft_config) -> None:
        names = model.config.specialist_names
        chosen = names if args.train_specialists is None else args.train_specialists
        if not set(chosen) <= set(names) or not chosen:
            raise ValueError(f"`train_specialists` must name some of {names}, but is {args.train_specialists}.")
        if peft_config is None:
            model.requires_grad_(True)
        self._trained = [n in chosen for n in names]
        reader = model.model.reader
        if not reader.one_by_one and (peft_config is not None or args.one_specialist_at_a_time):
            raise ValueError(
                f"Specialists that are adapters of one base learn through those, all in one pass, so "
                f"{'`peft_config`' if peft_config is not None else '`one_specialist_at_a_time`'} is for specialists "
                f"that are models of their own. Leave it out."
            )
        reader.train_only(model, chosen)
        if args.train_only is not None:
            _train_matching(model, args.train_only, peft_config)
        if peft_config is not None:
            if args.train_specialists is not None:
                raise ValueError(
                    "`train_specialists` and `peft_config` both choose what moves. Name the specialists in the adapter: "
                    "target_modules=r'.*specialists\\.code\\..*(q_proj|v_proj)'."
                )
            saved = set(peft_config.modules_to_save or [])
            if list(model.model.fusion_gate.parameters()):
                peft_config.modules_to_save = sorted(saved | {"fusion_gate"})
        elif set(chosen) != set(names):
            for parameter, dim, places in _kept_parts(model, self._trained):
                parameter.register_hook(partial(_without, dim=dim, places=places))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Creates TRL's optimizer, with the learning rates of gate and heads where they differ.

        Parts of parameters that are not trained stay as they are, whatever it does to them.
        """
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rates = {"gate": self.args.gate_learning_rate, "heads": self.args.head_learning_rate}
        set_rates(optimizer, self.model if model is None else model, rates)
        if created and not all(self._trained):
            kept, before = _kept_parts(self.fused, self._trained), []

            @torch.no_grad()
            def put_back(*_):
                # weight decay moves what has no gradient too
                for parameter, dim, places in reversed(kept):
                    parameter.index_copy_(dim, places.to(parameter.device), before.pop())

            def keep(*_):
                before.extend(p.detach().index_select(dim, places.to(p.device)) for p, dim, places in kept)

            optimizer.register_step_pre_hook(keep)
            optimizer.register_step_post_hook(put_back)
        return optimizer

    def training_step(self, *args, **kwargs) -> Tensor:
        """As TRL's; one specialist at a time it updates the parameters too, and leaves the optimizer nothing to do."""
        if self.serial is None:
            return super().training_step(*args, **kwargs)
        with self.serial.cut():
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.serial.finish(self.optimizer)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As every stage's, with the gradient norm from before the gradients went."""
        if self.serial is not None and "grad_norm" in logs:
            logs["grad_norm"] = self.serial.grad_norm
        super().log(logs, start_time)

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        return scaled_rate(specialist_size(model), 3e-4)


def _train_matching(model: PreTrainedModel, pattern: str, peft_config) -> None:
    """Freezes what would be trained and has another name than the pattern, as `Module.named_parameters` has them.

    The modules of some layers, as CoFiTune trains them (Zhang et al., 2024, arXiv 2404.10306), which searches for them.

    Raises:
        ValueError: If it is no pattern or matches nothing, or adapters choose what moves.
    """
    if peft_config is not None:
        raise ValueError(
            "`train_only` and `peft_config` both choose what moves, and only adapters and the gate do with the latter. Name "
            f"the layers in the adapter: target_modules={pattern!r}."
        )
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(
            f"`train_only` is a regular expression, but {pattern!r} is none: {error}. Correct it."
        ) from error
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(map(matches, trained)):
        near = difflib.get_close_matches(pattern, trained, n=3, cutoff=0.0)
        raise ValueError(
            f"`train_only` must match the whole name of a parameter that is trained, but {pattern!r} matches none. The nearest "
            f"are {near}. Write .* for the parts of a name that may differ."
        )
    for name, parameter in trained.items():
        parameter.requires_grad_(matches(name) is not None)


def _kept_parts(model: PreTrainedModel, trained: list[bool]) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Returns, of each parameter in which all specialists have a part, the dimension and the indices of frozen ones."""
    parts = model.model.reader.shared_parts([not t for t in trained])
    found = [(model.get_parameter(name), dim, index) for name, (dim, index) in parts.items()]
    return [part for part in found if part[0].requires_grad]


def _without(gradient: Tensor, dim: int, places: Tensor) -> Tensor:
    return gradient.index_fill(dim, places.to(gradient.device), 0)


def set_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float | None]) -> None:
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
    return torch.tensor(float(rate)) if isinstance(before, Tensor) else rate


def _part(name: str) -> str:
    return "gate" if "fusion_gate" in name else "heads" if "lm_head" in name else "specialists"
