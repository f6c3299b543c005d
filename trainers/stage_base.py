"""Base of the paper's two stages (Ding et al., 2024, Algorithm 1), and of training a single model, on TRL's `SFTTrainer`.

A fused model is an ordinary causal language model, so TRL already computes the right loss. A stage chooses which
parameters it trains and how fast, draws its batches from the domains, logs losses and gate weights by domain, and resumes
exactly.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback

from modeling_ultrafuser.gate_base_ultrafuser import Gate, Reads

from .batch_statistics import Statistics
from .compat import is_zero_3, keep_head_whole, remember_callback
from .domain_trainer import DomainTrainer, data_seed
from .domains import DomainCollator, by_domain, split, together
from .forward_hooks import best_specialists, capture, own_log_probs
from .label_scorer import LabelScorer
from .losses import gate_terms, group_factors
from .mix.mix_controller import MixController
from .mix.mixes import MIXES
from .mix.probe import Probe
from .mix.shares import importance_weights
from .mixed import MIXED
from .responses import learns_responses
from .resumable import Resumable
from .samplers import SAMPLERS
from .stage_checkpoint import EndedError, has_stopped
from .stage_checks import check_domains, check_quantised, check_terms, fused_model, is_trl_loss
from .stage_config import GATE_DROPOUT, GATE_SCALE, MIXED_SHARE, StageConfig, accumulate
from .stage_metrics import domain_metrics


class StageTrainer(Resumable, DomainTrainer):
    """Base of all stages. A stage defines `_choose_parameters` and `default_learning_rate`.

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
        name = type(self).__name__
        args = self.config_class(name) if args is None else args
        model = self._checked(model, args)
        parts, self.vocab_size = by_domain(train_dataset), model.config.vocab_size
        self.domains, specialists = sorted(parts), getattr(model.config, "specialist_names", [])
        self._fill_in(args, model, is_trl_loss(args, kwargs))
        check_domains(args, self.domains, specialists)
        if args.assistant_only_loss is None:
            tokenizer = kwargs.get("processing_class") or model.name_or_path
            args.assistant_only_loss = self._responses_by_default = learns_responses(parts, tokenizer)
        self.stopping = EarlyStoppingCallback(args.early_stopping) if args.early_stopping else None
        if self.stopping is not None:
            if kwargs.get("eval_dataset") is None:
                parts, held_out = split(parts, args.held_out, data_seed(args))
                train_dataset, kwargs["eval_dataset"] = parts, together(held_out)
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), self.stopping]
        # what batches are drawn from
        self.drawn = [*self.domains, MIXED] if args.mixed_share else self.domains
        self.own_specialists = [specialists.index(d) if d in specialists else None for d in self.domains]
        check_quantised(model, self.stage, kwargs.get("peft_config"))
        self._choose_parameters(model, args, kwargs.get("peft_config"))
        if args.learning_rate is None:
            args.learning_rate = self.default_learning_rate(model)
        check_terms(args, model, kwargs)
        accumulate(args, len(self.domains))
        self.specialist_names, gate = specialists, self._gate_tensors(model)
        super().__init__(model, args, train_dataset=self._rows_for_trl(parts, train_dataset, args), **kwargs)
        self._parts = self._stand_in = None
        self._prepare_model(gate)
        self._prepare_draws()
        self._begin()
        self.add_callback(_StageCallback(self))

    def _checked(self, model: PreTrainedModel | str, args: StageConfig) -> PreTrainedModel:
        """Returns the model, loaded if it is a folder or a Hub id. Rejects what the stage does not train."""
        return fused_model(model, args, self.config_class, type(self).__name__)

    def _gate_tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Returns copies of the gate's tensors, which TRL may round."""
        return {name: tensor.clone() for name, tensor in model.model.fusion_gate.state_dict().items()}

    def _fill_in(self, args: StageConfig, model: PreTrainedModel, adds_terms: bool) -> None:
        """Chooses defaults that depend on the stage, the data and the gate, and on whether terms can be added to the loss."""
        first = self.stage == "gate"
        # rows that are not prepared may be anything
        as_they_are = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
        if args.mixed_share is None:
            mixable = len(self.domains) > 1 and MIXED not in self.domains and not as_they_are
            args.mixed_share = MIXED_SHARE if first and mixable else 0.0
        if args.gate_dropout is None:
            args.gate_dropout = GATE_DROPOUT if first and Reads.STATES in model.model.fusion_gate.reads else 0.0
        if args.gate_scale is None:
            args.gate_scale = GATE_SCALE if adds_terms and model.config.gate_calibration else 0.0

    def _prepare_model(self, gate: Mapping[str, Tensor]) -> None:
        """Makes the model ready for training, once TRL has put its head and its adapters on it.

        Args:
            gate: The gate's tensors before.
        """
        self.fused = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for name, parameter in self.fused.model.fusion_gate.named_parameters():
            before = gate.get(name.removeprefix("modules_to_save.default."))
            if before is not None and parameter.dtype != before.dtype:
                # TRL rounds all that is trained beside quantised weights to bfloat16, which is too coarse for a gate
                parameter.data = before
        if not self.fused.model.fusion_rule.one_head and is_zero_3(self):
            raise ValueError(
                f"With fusion={self.fused.config.fusion!r} the loss reads the head a part at a time, and ZeRO-3 gathers it only where "
                "a whole layer runs. Train with FSDP2, or with ZeRO-2."
            )
        # PEFT trains a copy of the gate
        for module in self.fused.modules():
            if isinstance(module, Gate):
                module.dropout = self.args.gate_dropout
        self.scorer = LabelScorer(self.fused)
        keep_head_whole(self.fused)

    def _prepare_draws(self) -> None:
        """Makes the collator, and the mix to begin with (`prior`), for the prepared data."""
        args, names = self.args, self.train_dataset["domain"]
        self.data_collator = DomainCollator(self.data_collator, self.drawn)
        self.sizes = np.bincount([self.drawn.index(name) for name in names], minlength=len(self.drawn))
        self._lengths = self._mean_lengths(args.mix_unit)
        self.prior = MIXES[args.mix](args, self.domains).shares(self.sizes[: len(self.domains)])

    def _begin(self) -> None:
        """Resets sampler, statistics and mix controller to their state before the first step."""
        args, names = self.args, self.train_dataset["domain"]
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = SAMPLERS[args.sampler](names, batch_size, self.in_examples(self.prior), args.seed, self.drawn)
        signed = getattr(self.fused.config, "signed_weights", None) is not None
        self.statistics = Statistics(len(self.drawn), len(self.specialist_names), signed)
        self.gate_factors = group_factors(args, self.drawn, self.specialist_names)
        self.controller = None
        if args.mix_reward is not None:
            self.controller = MixController(args, Probe(self), self.sampler, self.prior, self.in_examples)
        self.warned: set[str] = set()
        if self.stopping is not None:
            self.stopping.early_stopping_patience_counter = 0

    def _choose_parameters(self, model: PreTrainedModel, args: StageConfig, peft_config) -> None:
        """Sets which parameters are trained."""
        raise NotImplementedError

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        """Returns 2e-5 for specialists of a billion parameters or more, the paper's; a higher rate for smaller ones."""
        raise NotImplementedError

    # ---- loss

    def watch(self, **kept: bool) -> AbstractContextManager[dict]:
        """Collects what a forward pass within it gives, see `capture`."""
        return capture(self.fused, **kept)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes TRL's loss, which calls `LabelScorer`, plus importance weights and gate terms; counts the batch."""
        domain = inputs.pop("domain", None)
        if domain is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        own = self.controller is not None and self.controller.reward.watches_specialists
        to_best = bool(self.args.gate_domain) and self.args.gate_domain_target == "best"
        to_best = to_best and self.state.global_step < self.args.gate_domain_steps
        with self.watch(own=own or to_best) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        scores, gate_weights, domain = seen["scores"], seen["gate_weights"][:, :-1], domain[:, 1:]
        scales = None if seen["scales"] is None else seen["scales"][:, :-1]
        mask = scores.label_mask
        own_log_p = own_log_probs(self, seen, labels, domain) if own else None
        self.statistics.add(domain, mask, scores.log_probs, gate_weights, scales, own_log_p)
        best = best_specialists(self, seen, labels) if to_best else None
        terms = self._terms(scores.log_probs, gate_weights, scales, domain, best)
        if isinstance(terms, Tensor):
            loss = loss + self._normalised((terms * mask).sum(), mask, num_items_in_batch, loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _terms(
        self, log_probs: Tensor, gate_weights: Tensor, scales: Tensor | None, domain: Tensor, best: Tensor | None
    ) -> Tensor | float:
        """Returns what is added to the loss of each token, shape (batch, seq - 1), or 0.0."""
        terms, step = 0.0, self.state.global_step
        if self.args.mix_importance:
            weights = importance_weights(self.controller.mix_at(step) if self.controller else self.prior)
            weights = torch.tensor([*weights, 1.0], device=domain.device, dtype=log_probs.dtype)
            terms = terms - (weights[domain] - 1) * log_probs
        seen = (gate_weights, domain, self.own_specialists, self.statistics.last_mean, step)
        return terms + gate_terms(self.args, *seen, factors=self.gate_factors, best=best, scales=scales)

    def _normalised(self, total: Tensor, mask: Tensor, num_items_in_batch, device: torch.device) -> Tensor:
        """Divides a sum over tokens as `SFTTrainer` divides the loss."""
        items = mask.sum() if num_items_in_batch is None else num_items_in_batch
        mean = total / torch.as_tensor(items, device=device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            mean = mean * self.accelerator.num_processes
        return mean

    # ---- logs, checkpoints and resume

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, for every domain, loss, tokens, epochs, share of the mix, and mean gate weights."""
        if "loss" in logs:
            logs |= domain_metrics(self)
        super().log(logs, start_time)

    def identity(self) -> dict:
        """Returns what must be the same in a checkpoint for the stage to resume from it."""
        names = ("sampler", "mix_reward", "mix_policy")
        settings = {name: getattr(self.args, name) for name in names}
        return {**super().identity(), "prior": self.prior.tolist(), **settings}

    def progress(self) -> dict:
        """Returns the mixes so far, and the states of statistics, controller and early stopping."""
        return {
            "mixes": self.sampler.mixes,
            "statistics": self.statistics.state_dict(self.accelerator),
            "controller": self.controller and self.controller.state_dict(),
            "unimproved": self.stopping and self.stopping.early_stopping_patience_counter,
        }

    def restore(self, state: dict) -> None:
        """Restores what `progress` returned."""
        self.sampler.restore(state["mixes"])
        self.statistics.load_state_dict(state["statistics"], self.args.process_index, self.args.world_size)
        if self.stopping is not None:
            self.stopping.early_stopping_patience_counter = state.get("unimproved") or 0
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes no card: TRL's describes one base model. `ultrafuser card` and `ultrafuser push` write a fused model's."""


class _StageCallback(TrainerCallback):
    """Calls the stage when a run or an epoch begins, and after each step."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # weights, optimizer and state are those of the checkpoint now
        stopping = self.trainer.stopping
        if stopping is not None:
            remember_callback(state, stopping)
        if state.global_step >= state.max_steps or has_stopped(stopping):
            raise EndedError
        if self.trainer.controller is not None:
            self.trainer.controller.reward.begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # `Trainer`'s own call does not reach a sampler inside the loaders of a resumed run on several processes
        self.trainer.sampler.set_epoch(state.global_step // self.trainer.sampler.batches_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if args.gate_balance:
            sums = self.trainer.statistics.since("balance", self.trainer.accelerator)
            factors = self.trainer.gate_factors
            gate = sums.gate if factors is None else sums.gate * factors.numpy()
            self.trainer.statistics.last_mean = torch.tensor(gate.sum(0) / max(sums.tokens.sum(), 1))
        if self.trainer.controller is not None and state.global_step % args.mix_every == 0:
            self.trainer.controller.update(state.global_step)


def specialist_size(model: PreTrainedModel) -> float:
    """Mean number of parameters of a specialist."""
    # ZeRO-3 leaves parameters empty, and says how many there were
    sizes = [getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if "fusion_gate" not in n]
    return sum(sizes) / len(model.config.backbones)
