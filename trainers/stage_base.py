"""What the two stages of the paper share (Ding et al., 2024, Algorithm 1), on TRL's `SFTTrainer`.

A fused model is an ordinary causal language model, so TRL already computes the right loss. A stage says which
parameters it trains and how fast, draws its batches from the domains, watches who speaks where, and resumes exactly.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from modeling_ultrafuser.gate_base_ultrafuser import Gate

from .batch_statistics import Statistics
from .chunked import add_chunked_head
from .domain_trainer import DomainTrainer, data_seed
from .domains import DomainCollator, by_domain, split, together
from .forward_hooks import capture, keep_head_whole, own_log_probs
from .losses import gate_terms
from .mix.mix_controller import MixController
from .mix.rewards import REWARDS
from .mix.shares import importance_weights, static_mix
from .mixed import MIXED
from .samplers.sampler_base import DomainSampler
from .stage_checkpoint import (
    EndedError,
    has_stopped,
    last_complete_checkpoint,
    load_state,
    refuse_model_alone,
    write_state,
)
from .stage_config import GATE_DROPOUT, MIXED_SHARE, StageConfig, accumulate
from .stage_metrics import domain_metrics


class StageTrainer(DomainTrainer):
    """What both stages share.

    Args:
        model: A fused model, its folder or its Hub id.
        args: The stage's configuration.
        train_dataset: A dataset with a column `domain`, or one dataset per domain name. Rows as for `SFTTrainer`.
        **kwargs: As for `SFTTrainer`.

    Raises:
        ValueError: If the data has no domains, the model is not a fused one, or nothing would be trained.
    """

    config_class: type[StageConfig]
    stage: str

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: StageConfig | None = None,
        train_dataset: Dataset | Mapping[str, Dataset] | None = None,
        **kwargs,
    ):
        name, config = type(self).__name__, self.config_class
        args = config(name) if args is None else args
        if not isinstance(args, config):
            raise ValueError(
                f"{name} reads its settings from a {config.__name__}, but got a {type(args).__name__}. It takes the "
                f"same fields and has defaults of its own: {config.__name__}(output_dir, ...)."
            )
        if isinstance(model, str):
            chosen = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            model = AutoModelForCausalLM.from_pretrained(model, **chosen)
        if isinstance(model, PeftModel):
            raise ValueError(
                f"{name} decides what is trained, so it adds adapters itself, but got a {type(model).__name__}. Pass the "
                f"fused model and `peft_config=...` to `JointTrainer`, or merge first: `model.merge_and_unload()`."
            )
        if model.config.model_type != "ultrafuser":
            raise ValueError(
                f"{name} trains a fused model, but got a {type(model).__name__}. Build one with "
                f"`UltraFuserForCausalLM.from_specialists(...)`, or train a single model with TRL's `SFTTrainer`."
            )
        parts, self.vocab_size = by_domain(train_dataset), model.config.vocab_size
        self.domains = sorted(parts)
        self._fill_in(args, model)
        if args.mixed_share and MIXED in self.domains:
            raise ValueError(
                f"Mixed examples are counted as a domain {MIXED!r}, but there is one of that name already. Rename it, or set "
                f"mixed_share=0."
            )
        self.stopping = EarlyStoppingCallback(args.early_stopping) if args.early_stopping else None
        if self.stopping is not None:
            if kwargs.get("eval_dataset") is None:
                parts, held_out = split(parts, args.held_out, data_seed(args))
                train_dataset, kwargs["eval_dataset"] = parts, together(held_out)
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.stopping]
        # what batches are drawn from
        self.drawn = [*self.domains, MIXED] if args.mixed_share else self.domains
        self.own_specialists = [
            model.config.specialist_names.index(d) if d in model.config.specialist_names else None
            for d in self.domains
        ]
        compared = args.mix_reward is not None and REWARDS[args.mix_reward].needs_specialists
        if None in self.own_specialists and (compared or args.gate_domain):
            raise ValueError(
                f"`mix_reward={args.mix_reward!r}` and `gate_domain` compare each domain with its own specialist, so domains must "
                f"be named as specialists are, but domains are {self.domains} and specialists are "
                f"{model.config.specialist_names}."
            )
        _check_quantised(model, self.stage, kwargs.get("peft_config"))
        self._choose_parameters(model, args, kwargs.get("peft_config"))
        if args.learning_rate is None:
            args.learning_rate = self.default_learning_rate(model)
        _check_terms(args, kwargs)
        if args.gate_dropout and not model.model.fusion_gate.reads_states:
            raise ValueError(
                f"`gate_dropout` hides what the gate reads of hidden states, but the gate {model.config.gate!r} reads none. "
                f"Set gate_dropout=0, or train another gate."
            )
        accumulate(args, len(self.domains))
        gate = {name: tensor.clone() for name, tensor in model.model.fusion_gate.state_dict().items()}
        super().__init__(model, args, train_dataset=self._given(parts, train_dataset, args), **kwargs)
        self._parts = self._stand_in = None

        self.fused = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for name, parameter in self.fused.model.fusion_gate.named_parameters():
            own = gate.get(name.removeprefix("modules_to_save.default."))
            if own is not None and parameter.dtype != own.dtype:
                # TRL rounds all that is trained beside quantised weights to bfloat16, which is too coarse for a gate
                parameter.data = own
        by_zero_3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if not self.fused.model.fusion_rule.one_head and by_zero_3:
            raise ValueError(
                f"With fusion={self.fused.config.fusion!r} the loss reads the head a part at a time, and ZeRO-3 gathers it only where "
                "a whole layer runs. Train with FSDP2, or with ZeRO-2."
            )
        # PEFT trains a copy of the gate
        for module in self.fused.modules():
            if isinstance(module, Gate):
                module.dropout = args.gate_dropout
        add_chunked_head(self.fused)
        keep_head_whole(self.fused)
        self.data_collator = DomainCollator(self.data_collator, self.drawn)
        self.sizes = np.bincount(
            [self.drawn.index(d) for d in self.train_dataset["domain"]], minlength=len(self.drawn)
        )
        self._lengths = self._mean_lengths(args.mix_unit)
        weights = [(args.mix_weights or {}).get(d, 0.0) for d in self.domains] if args.mix == "fixed" else None
        if set(args.mix_weights or {}) - set(self.domains):
            raise ValueError(f"`mix_weights` names {sorted(args.mix_weights)}, but the domains are {self.domains}.")
        self.prior = static_mix(
            args.mix, self.sizes[: len(self.domains)], temperature=args.mix_temperature, weights=weights
        )
        self._begin()
        self.add_callback(_StageCallback(self))

    def _fill_in(self, args: StageConfig, model: PreTrainedModel) -> None:
        """Settings of stage one that depend on data and gate, where they are left open."""
        first = self.stage == "gate"
        # rows that are not prepared may be anything
        as_they_are = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
        if args.mixed_share is None:
            mixable = len(self.domains) > 1 and MIXED not in self.domains and not as_they_are
            args.mixed_share = MIXED_SHARE if first and mixable else 0.0
        if args.gate_dropout is None:
            args.gate_dropout = GATE_DROPOUT if first and model.model.fusion_gate.reads_states else 0.0

    def _begin(self) -> None:
        """What a run moves, as it is before the first step."""
        args, places = self.args, self.train_dataset["domain"]
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = DomainSampler(places, batch_size, self.in_examples(self.prior), args.seed, self.drawn)
        self.statistics = Statistics(len(self.drawn), len(self.fused.config.specialist_names))
        self.controller = MixController(self) if args.mix_reward is not None else None
        self.warned: set[str] = set()
        if self.stopping is not None:
            self.stopping.early_stopping_patience_counter = 0

    def _choose_parameters(self, model: PreTrainedModel, args: StageConfig, peft_config) -> None:
        raise NotImplementedError

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        """2e-5 for specialists of a billion parameters or more, the paper's; higher for smaller ones, as measured."""
        raise NotImplementedError

    # ---- loss and what is watched on the way

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, with importance weights and gate terms where asked for, and statistics by domain."""
        domain = inputs.pop("domain", None)
        if domain is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        own = self.controller is not None and self.controller.reward.watches_specialists
        with capture(self.fused, own=own) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        scores, gate_weights, mask = seen["scores"], seen["gate_weights"][:, :-1], seen["scores"].label_mask
        domain = domain[:, 1:]
        own_scores = None
        if own:
            own_scores = own_log_probs(self.fused, self.own_specialists, seen["hidden_states"], labels, domain, mask)
        self.statistics.add(domain, mask, scores.log_probs, gate_weights, own_scores)

        # per token, so that they are summed and normalised exactly as the loss is
        extra = 0.0
        step = self.state.global_step
        if self.args.mix_importance:
            weights = importance_weights(self.controller.mix_at(step) if self.controller else self.prior)
            weights = torch.tensor([*weights, 1.0], device=domain.device, dtype=scores.log_probs.dtype)
            extra = extra - (weights[domain] - 1) * scores.log_probs
        extra = extra + gate_terms(
            self.args, gate_weights, domain, self.own_specialists, self.statistics.last_mean, step
        )
        if isinstance(extra, Tensor):
            items = mask.sum() if num_items_in_batch is None else num_items_in_batch
            extra = (extra * mask).sum() / torch.as_tensor(items, device=loss.device).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                extra = extra * self.accelerator.num_processes
            loss = loss + extra
        return (loss, *outputs) if return_outputs else loss

    # ---- optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Gate, heads and specialists in groups of their own, each with its learning rate."""
        optimizer = super().create_optimizer(model)
        rates = {
            "gate": getattr(self.args, "gate_learning_rate", None),
            "heads": getattr(self.args, "head_learning_rate", None),
        }
        if any(rate is not None for rate in rates.values()):
            part_of = {id(p): _part(n) for n, p in (self.model if model is None else model).named_parameters()}
            groups = []
            for group in optimizer.param_groups:
                for part in ("gate", "heads", "specialists"):
                    chosen = [p for p in group["params"] if part_of[id(p)] == part]
                    if chosen:
                        rate = group["lr"] if rates.get(part) is None else rates[part]
                        if isinstance(group["lr"], Tensor):
                            # as compiled optimizers keep it; schedules write into it
                            rate = torch.tensor(float(rate))
                        groups.append({**group, "params": chosen, "lr": rate})
            optimizer.param_groups[:] = groups
        return optimizer

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, for every domain, loss, tokens, epochs, share of the mix, and who spoke."""
        if "loss" in logs:
            logs |= domain_metrics(self)
        super().log(logs, start_time)

    # ---- resume

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`. A stage resumes from its own checkpoints only; unfinished ones are passed over.

        One that had ended is as it was when it ended: the library would take one more step.

        Raises:
            ValueError: If there is no checkpoint to resume from, or it is of another run.
        """
        if self.sampler.batches_drawn:
            self._begin()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                for checkpoint in Path(self.args.output_dir).glob("checkpoint-*"):
                    refuse_model_alone(checkpoint, type(self).__name__)
                raise ValueError(
                    f"There is no complete checkpoint of a stage to resume from in {self.args.output_dir!r}. Check the "
                    f"folder, or begin anew with `train()`."
                )
        if resume_from_checkpoint:
            load_state(self, resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except EndedError:
            self.is_in_train = False
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(self.state.global_step, 0.0, {})

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: TRL's tells of one base model. `ultrafuser card` and `ultrafuser push` write a fused model's."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes beside random numbers what the stage knows, before the library drops old checkpoints."""
        super()._save_rng_state(output_dir)
        write_state(self, output_dir)
        # what every process wrote is there before the file that makes a checkpoint complete
        self.accelerator.wait_for_everyone()


def specialist_size(model: PreTrainedModel) -> float:
    """Mean number of parameters of a specialist."""
    # ZeRO-3 leaves parameters empty, and says how many there were
    sizes = [getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if "fusion_gate" not in n]
    return sum(sizes) / len(model.config.backbones)


def _part(name: str) -> str:
    return "gate" if "fusion_gate" in name else "heads" if "lm_head" in name else "specialists"


def _check_quantised(model: PreTrainedModel, stage: str, peft_config) -> None:
    """Refuses to train what has no gradients."""
    method = getattr(model, "quantization_method", None)
    if method is not None and peft_config is None:
        raise ValueError(
            f"Quantised weights learn through adapters beside them, but this model is quantised "
            f"({getattr(method, 'value', method)}) and stage {stage} got no `peft_config`. "
            + (
                "Train the gate before quantising: it takes no more memory than the weights."
                if stage == "gate"
                else "Give it one (--use_peft), or load the model without `quantization_config`."
            )
        )


def _check_terms(args: StageConfig, kwargs: dict) -> None:
    """Refuses what would leave terms of the loss out, or draws where they are not counted, without a word."""
    terms = [t for t in ("gate_entropy", "gate_balance", "gate_domain", "mix_importance") if getattr(args, t)]
    if terms and (args.label_smoothing_factor or kwargs.get("compute_loss_func")):
        raise ValueError(
            f"{terms} are added to TRL's own loss, token by token, but `label_smoothing_factor` or `compute_loss_func` "
            f"puts another in its place. Leave one of them out."
        )
    if args.mix_importance and args.loss_type != "nll":
        raise ValueError(f"`mix_importance` weighs log-likelihoods, but loss_type={args.loss_type!r}. Use 'nll'.")
    if args.push_to_hub:
        raise ValueError(
            "`push_to_hub` of a trainer would send all that is in its output folder, cached data and pickled arguments "
            "included. Push the model when it is trained: `ultrafuser push FOLDER OWNER/NAME`."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` would change the batch size in mid-run, but draws are counted in batches. Lower "
            "`per_device_train_batch_size` by hand: the number of accumulated steps follows."
        )


class _StageCallback(TrainerCallback):
    """Calls the stage at the moments it needs."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # weights, optimizer and state are those of the checkpoint now
        stopping = self.trainer.stopping
        if stopping is not None:
            # the library looks for it, also in a checkpoint of a run that had none
            state.stateful_callbacks.setdefault(type(stopping).__name__, stopping.state())
        if state.global_step >= state.max_steps or has_stopped(stopping):
            raise EndedError
        if self.trainer.controller is not None:
            self.trainer.controller.reward.begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # the library's own call does not reach a sampler inside the loaders of a resumed run on several processes
        self.trainer.sampler.set_epoch(state.global_step // self.trainer.sampler.batches_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if args.gate_balance:
            found = self.trainer.statistics.since("balance", self.trainer.accelerator)
            self.trainer.statistics.last_mean = torch.tensor(found.gate.sum(0) / max(found.tokens.sum(), 1))
        if self.trainer.controller is not None and state.global_step % args.mix_every == 0:
            self.trainer.controller.update()
