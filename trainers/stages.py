"""The two stages of the paper (Ding et al., 2024, Algorithm 1) on TRL's `SFTTrainer`.

A fused model is an ordinary causal language model, so TRL already computes the right loss. A stage says which
parameters it trains and how fast, draws its batches from the domains, watches who speaks where, and resumes exactly.
"""

import copy
import json
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, List, Value
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer, is_conversational

from modeling_ultrafuser.adapters_ultrafuser import adapter_parameters
from modeling_ultrafuser.tokenizing_ultrafuser import print_line

from .chunked import add_chunked_head
from .controlling import MixController
from .domains import DomainCollator, Losses, by_domain, filled, readable, together
from .losses import gate_terms
from .mixed import MIXED, mixed_examples, with_share
from .mixing import effective_epochs, importance_weights, static_mix
from .sampling import DomainSampler
from .serial import SerialBackward
from .settings import GateStageConfig, JointStageConfig, StageConfig, accumulate, scaled_rate
from .watching import Statistics, Sums, keep_head_whole, own_log_probs, watching


STATE_FILE = "ultrafuser_stage.json"


class _StageTrainer(SFTTrainer):
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
    _stand_in: Dataset | None = None

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
        if args.mixed_share and MIXED in self.domains:
            raise ValueError(
                f"Mixed examples are counted as a domain {MIXED!r}, but there is one of that name already. Rename it, or set "
                f"mixed_share=0."
            )
        # what batches are drawn from
        self.drawn = [*self.domains, MIXED] if args.mixed_share else self.domains
        self.own_specialists = [
            model.config.specialist_names.index(d) if d in model.config.specialist_names else None
            for d in self.domains
        ]
        if None in self.own_specialists and (args.mix_reward == "regret" or args.gate_domain):
            raise ValueError(
                f"`mix_reward='regret'` and `gate_domain` compare each domain with its own specialist, so domains must "
                f"be named as specialists are, but domains are {self.domains} and specialists are "
                f"{model.config.specialist_names}."
            )
        _check_quantised(model, self.stage, kwargs.get("peft_config"))
        self._choose_parameters(model, args, kwargs.get("peft_config"))
        if args.learning_rate is None:
            args.learning_rate = self.default_learning_rate(model)
        _check_terms(args, kwargs)
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
        if self.fused.config.fusion == "probabilities" and by_zero_3:
            raise ValueError(
                "With fusion='probabilities' the loss reads the head a part at a time, and ZeRO-3 gathers it only where "
                "a whole layer runs. Train with FSDP2, or with ZeRO-2."
            )
        self.fused.model.fusion_gate.dropout = args.gate_dropout
        add_chunked_head(self.fused)
        keep_head_whole(self.fused)
        self.data_collator = DomainCollator(self.data_collator, self.drawn)
        self.sizes = np.bincount(
            [self.drawn.index(d) for d in self.train_dataset["domain"]], minlength=len(self.drawn)
        )
        if not self.sizes.all():
            raise ValueError(
                f"Every domain needs examples with a supervised token, but nothing is left of "
                f"{[d for d, n in zip(self.drawn, self.sizes, strict=True) if not n]} once prompts are masked and "
                f"examples cut to `max_length={args.max_length}`. Look at the rows, or raise `max_length`."
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

    def _begin(self) -> None:
        """What a run moves, as it is before the first step."""
        args, places = self.args, self.train_dataset["domain"]
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = DomainSampler(places, batch_size, self.in_examples(self.prior), args.seed, self.drawn)
        self.statistics = Statistics(len(self.drawn), len(self.fused.config.specialist_names))
        self.controller = MixController(self) if args.mix_reward is not None else None
        self._warned: set[str] = set()

    def _choose_parameters(self, model: PreTrainedModel, args: StageConfig, peft_config) -> None:
        raise NotImplementedError

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        """2e-5 for specialists of a billion parameters or more, the paper's; higher for smaller ones, as measured."""
        raise NotImplementedError

    # ---- data

    def _given(self, parts: dict[str, Dataset], dataset, args: StageConfig) -> Dataset:
        """What TRL is given: all rows if it takes them as they are, or else one domain, in whose place all are prepared."""
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            if args.mixed_share:
                parts = {**parts, MIXED: mixed_examples(parts, args.mixed_share, args.seed)}
            return dataset if isinstance(dataset, Dataset) and not args.mixed_share else together(parts)
        # TRL looks at the first row for assistants
        self._parts, first = parts, next(iter(parts.values()))
        conversations = (p for p in parts.values() if args.assistant_only_loss and is_conversational(p[0]))
        self._stand_in = next(conversations, first).select([0])
        return self._stand_in

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's preparation, one domain at a time: domains are in forms of their own, and no pack holds two of them."""
        if not isinstance(dataset, Dataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        settings = (processing_class, args, packing, formatting_func)
        if dataset is self._stand_in:
            parts = self._parts
        elif "domain" in dataset.column_names:
            parts = by_domain(dataset)
        else:
            return self._prepare_rows(dataset, dataset_name, *settings)
        prepared = {name: self._prepare_rows(parts[name], f"domain {name!r}", *settings) for name in sorted(parts)}
        if dataset is self._stand_in and args.mixed_share:
            prepared[MIXED] = mixed_examples(prepared, args.mixed_share, args.seed)
        return together(prepared)

    def _prepare_rows(self, rows: Dataset, whose: str, processing_class, args, packing, formatting_func) -> Dataset:
        """TRL's preparation of one form of rows, and a line on what it leaves out."""
        rows = filled(rows)
        if formatting_func is None:
            rows = readable(
                rows,
                whose,
                text_field=args.dataset_text_field,
                vocab_size=self.vocab_size,
                only=args.remove_unused_columns,
            )
        if args.completion_only_loss is None:
            self.completion_only_loss = {"prompt", "completion"} <= set(rows.column_names)
        # tokens first, as long as they are
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        rows = super()._prepare_dataset(rows, processing_class, uncut, False, formatting_func, whose)
        keep_end = args.truncation_mode == "keep_end"
        losses = Losses(None if packing and args.packing_strategy != "bfd" else args.max_length, keep_end)
        losses.count(rows.with_format(None).select_columns(["input_ids", "labels"]))
        if str(losses) and args.should_log:
            print_line(f"Of {losses.rows} rows of {whose}, {losses}.")
        rows = super()._prepare_dataset(rows, processing_class, args, packing, None, whose)
        if args.remove_unused_columns:
            self._signature_columns = None
            self._set_signature_columns_if_needed()
            rows = rows.select_columns([c for c in rows.column_names if c in self._signature_columns])
        for column in {"input_ids", "labels"} & set(rows.column_names):
            if rows.features[column] != (tokens := List(Value("int64"))):
                rows = rows.cast_column(column, tokens)
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "domain" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "domain"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.sampler

    def _mean_lengths(self, unit: str) -> np.ndarray:
        if unit == "example":
            return np.ones(len(self.domains))
        column, lengths = "input_ids" if unit == "token" else "labels", [[] for _ in self.domains]
        if column not in self.train_dataset.column_names:
            raise ValueError(
                f"`mix_unit={unit!r}` needs prepared examples to count their tokens, but the dataset's columns are "
                f"{self.train_dataset.column_names}. Use mix_unit='example'."
            )
        for row in self.train_dataset:
            if row["domain"] == MIXED and self.args.mixed_share:
                continue
            counted = row[column] if unit == "token" else [i for i in row[column] if i != -100]
            lengths[self.domains.index(row["domain"])].append(len(counted))
        return np.array([np.mean(n) for n in lengths])

    def in_examples(self, mix: np.ndarray) -> np.ndarray:
        """A mix counted in `mix_unit` as one counted in examples, which is what is drawn. Shape (drawn,)."""
        shares = mix / self._lengths
        shares = shares / shares.sum()
        return with_share(shares, self.args.mixed_share) if self.args.mixed_share else shares

    # ---- loss and what is watched on the way

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, with importance weights and gate terms where asked for, and statistics by domain."""
        domain = inputs.pop("domain", None)
        if domain is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        own = self.controller is not None and self.controller.reads_own_specialists
        with watching(self.fused, own=own) as seen:
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
            logs |= self._domain_metrics()
        super().log(logs, start_time)

    def _domain_metrics(self) -> dict[str, float]:
        found = self.statistics.since("log", self.accelerator)
        step = self.state.global_step
        epochs = effective_epochs(self.sampler.counts(step), self.sizes)
        mix = self.sampler.mix(max(step - 1, 0))
        names = self.fused.config.specialist_names
        metrics = {}
        for d, domain in enumerate(self.drawn):
            tokens = found.tokens[d]
            metrics |= {f"tokens/{domain}": tokens, f"epochs/{domain}": epochs[d], f"mix/{domain}": mix[d]}
            if tokens:
                metrics |= {
                    f"loss/{domain}": found.nll[d] / tokens,
                    f"gate_entropy/{domain}": found.entropy[d] / tokens,
                }
                metrics |= {f"gate/{domain}/{n}": w for n, w in zip(names, found.gate[d] / tokens, strict=True)}
                metrics |= {f"top1/{domain}/{n}": w for n, w in zip(names, found.top1[d] / tokens, strict=True)}
        if self.controller is not None:
            metrics |= self.controller.metrics()
        self._warn(found, mix)
        return {name: round(float(value), 6) for name, value in metrics.items()}

    def _warn(self, found: Sums, mix: np.ndarray) -> None:
        silent = [d for d, n in enumerate(found.tokens) if not n and mix[d] * self.sampler.batch_size >= 1]
        if silent and found.tokens.sum():
            raise ValueError(
                f"Every domain's batches must hold supervised tokens, but since the last log "
                f"{[self.drawn[d] for d in silent]} held none: all its labels are -100. Look at its rows, at the chat "
                f"template's generation marks, and at `max_length`."
            )
        shares = found.gate.sum(0) / max(found.tokens.sum(), 1)
        names, number = self.fused.config.specialist_names, len(shares)
        if number > 1 and shares.max() > 0.98 and "collapse" not in self._warned:
            self._warned.add("collapse")
            warnings.warn(
                f"The gate has collapsed: {names[int(shares.argmax())]!r} has {shares.max():.1%} of the weight over all "
                f"domains. Check that every domain is drawn; `gate_balance` counteracts it.",
                stacklevel=2,
            )
        entropy = found.entropy.sum() / max(found.tokens.sum(), 1)
        late = self.state.global_step > max(20, 0.2 * (self.state.max_steps or 0))
        learns = any(p.requires_grad for p in self.fused.model.fusion_gate.parameters())
        if late and learns and entropy > 0.999 * np.log(number) and "still" not in self._warned:
            self._warned.add("still")
            warnings.warn(
                f"The gate has hardly moved after {self.state.global_step} steps: its entropy is {entropy:.4f} nats of "
                f"at most {np.log(number):.4f}. Raise `learning_rate` (now {self.args.learning_rate:g}).",
                stacklevel=2,
            )

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
                    self._refuse_model_alone(checkpoint)
                raise ValueError(
                    f"There is no complete checkpoint of a stage to resume from in {self.args.output_dir!r}. Check the "
                    f"folder, or begin anew with `train()`."
                )
        if resume_from_checkpoint:
            self._load_state(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except _EndedError:
            self.is_in_train = False
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(self.state.global_step, 0.0, {})

    def _load_state(self, checkpoint: str | os.PathLike) -> None:
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            self._refuse_model_alone(path.parent)
            raise ValueError(
                f"A stage resumes from a checkpoint that it wrote itself, but {str(checkpoint)!r} has no {STATE_FILE}: "
                f"it is another trainer's, or was cut off while being written. Choose another one, or start a new run "
                f"from its model."
            )
        # older checkpoints are of runs without mixed examples
        state = {"mixed_share": 0.0, **json.loads(path.read_text())}
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise ValueError(
                    f"A stage resumes what it began, because optimizer, schedule and draws belong together, but {key} "
                    f"is {state[key]!r} in {str(checkpoint)!r} and {own!r} here. Start a new run from its model: "
                    f"{type(self).__name__}({str(checkpoint)!r}, ...)."
                )
        self.sampler.restore(state["mixes"])
        self.statistics.load_state_dict(state["statistics"], self.args.process_index, self.args.world_size)
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])

    def _refuse_model_alone(self, checkpoint: Path) -> None:
        # torch, FSDP and DeepSpeed call the optimizer's state differently
        state = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]
        if (checkpoint / TRAINER_STATE_NAME).exists() and not state:
            raise ValueError(
                f"A stage goes on with the state of its optimizer, but {str(checkpoint)!r} holds the model alone, as "
                f"`save_only_model=True` asks for. Start a new run from its model: {type(self).__name__}"
                f"({str(checkpoint)!r}, ...)."
            )

    def _identity(self) -> dict:
        """What must be the same for a run to be continued."""
        return {
            "stage": self.stage,
            "domains": self.domains,
            "sizes": self.sizes.tolist(),
            "batch_size": self.sampler.batch_size,
            "seed": self.args.seed,
            "prior": self.prior.tolist(),
            "mixed_share": self.args.mixed_share,
            "mix_reward": self.args.mix_reward,
            "mix_policy": self.args.mix_policy,
        }

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: TRL's tells of one base model. `ultrafuser card` and `ultrafuser push` write a fused model's."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes beside random numbers what the stage knows, before the library drops old checkpoints."""
        super()._save_rng_state(output_dir)
        statistics = self.statistics.state_dict(self.accelerator)
        if self.args.should_save:
            controller = None if self.controller is None else self.controller.state_dict()
            state = {
                **self._identity(),
                "mixes": self.sampler.mixes,
                "statistics": statistics,
                "controller": controller,
            }
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))
        # what every process wrote is there before the file that makes a checkpoint complete
        self.accelerator.wait_for_everyone()


class GateTrainer(_StageTrainer):
    """Stage one: trains the gate and leaves every specialist as it is.

    The specialists run without autograd, so no activations of theirs are kept.
    """

    config_class = GateStageConfig
    stage = "gate"

    def _choose_parameters(self, model: PreTrainedModel, args: GateStageConfig, peft_config) -> None:
        if not list(model.model.fusion_gate.parameters()):
            raise ValueError(
                f"Stage one trains the gate, but gate={model.config.gate!r} has no parameters. Fuse with gate='mlp'."
            )
        if peft_config is not None:
            raise ValueError("Stage one trains the gate alone, so there is nothing to adapt. Give LoRA to stage two.")
        model.requires_grad_(False)
        model.model.fusion_gate.requires_grad_(True)

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        return scaled_rate(_specialist_size(model), 1e-2)


class JointTrainer(_StageTrainer):
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
        if model.config.adapters is not None:
            if peft_config is not None or args.one_specialist_at_a_time:
                raise ValueError(
                    f"Specialists that are adapters of one base learn through those, all in one pass, so "
                    f"{'`peft_config`' if peft_config is not None else '`one_specialist_at_a_time`'} is for specialists "
                    f"that are models of their own. Leave it out."
                )
            model.requires_grad_(False)
            for parameter in (*adapter_parameters(model), *model.model.fusion_gate.parameters()):
                parameter.requires_grad_(True)
        if peft_config is not None:
            if args.train_specialists is not None:
                raise ValueError(
                    "`train_specialists` and `peft_config` both choose what moves. Name the specialists in the adapter: "
                    "target_modules=r'.*specialists\\.code\\..*(q_proj|v_proj)'."
                )
            saved = set(peft_config.modules_to_save or [])
            if model.config.gate != "uniform":
                peft_config.modules_to_save = sorted(saved | {"fusion_gate"})
        elif set(chosen) != set(names):
            if model.config.adapters is None:
                for name in set(names) - set(chosen):
                    model.model.specialists[name].requires_grad_(False)
            for parameter, dim, places in _kept_parts(model, self._trained):
                parameter.register_hook(partial(_without, dim=dim, places=places))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As every stage's, and parts of parameters that are not trained stay as they are, whatever it does to them."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
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
        return scaled_rate(_specialist_size(model), 3e-4)


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint of a stage that was written to its end, or None if there is none."""
    found = [p.parent for p in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    for checkpoint in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            # the library writes it last
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
            return str(checkpoint)
        except (OSError, json.JSONDecodeError):
            continue
    return None


def _specialist_size(model: PreTrainedModel) -> float:
    # ZeRO-3 leaves parameters empty, and says how many there were
    sizes = [getattr(p, "ds_numel", p.numel()) for n, p in model.named_parameters() if "fusion_gate" not in n]
    return sum(sizes) / len(model.config.backbones)


def _part(name: str) -> str:
    return "gate" if "fusion_gate" in name else "heads" if "lm_head" in name else "specialists"


def _kept_parts(model: PreTrainedModel, trained: list[bool]) -> list[tuple[nn.Parameter, int, Tensor]]:
    """What specialists that are not trained have of parameters in which all have a part: dimension, and places in it."""
    kept = ~torch.tensor(trained)
    if model.config.adapters is not None:
        return [(parameter, 0, kept.nonzero()[:, 0]) for parameter in adapter_parameters(model)]
    sizes = torch.tensor([c.hidden_size for c in model.config.specialists])
    return [(model.lm_head.weight, 1, torch.repeat_interleave(kept, sizes).nonzero()[:, 0])]


def _without(gradient: Tensor, dim: int, places: Tensor) -> Tensor:
    return gradient.index_fill(dim, places.to(gradient.device), 0)


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


class _EndedError(Exception):
    """A stage that is resumed has no step left."""


class _StageCallback(TrainerCallback):
    """Calls the stage at the moments it needs."""

    def __init__(self, trainer: _StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # weights, optimizer and state are those of the checkpoint now
        if state.global_step >= state.max_steps:
            raise _EndedError
        if self.trainer.controller is not None:
            self.trainer.controller.begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # the library's own call does not reach a sampler inside the loaders of a resumed run on several processes
        self.trainer.sampler.set_epoch(state.global_step // self.trainer.sampler.batches_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        if args.gate_balance:
            found = self.trainer.statistics.since("balance", self.trainer.accelerator)
            self.trainer.statistics.last_mean = torch.tensor(found.gate.sum(0) / max(found.tokens.sum(), 1))
        if self.trainer.controller is not None and state.global_step % args.mix_every == 0:
            self.trainer.controller.update()
