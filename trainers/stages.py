"""The two stages of the paper (Ding et al., 2024, Algorithm 1) on TRL's `SFTTrainer`.

A fused model is an ordinary causal language model, so TRL already computes the right loss. A stage says which
parameters it trains and how fast, draws its batches from the domains, watches who speaks where, and resumes exactly.
"""

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from .controlling import REWARDS, MixController
from .losses import add_mixture_head, gate_terms
from .mixing import effective_epochs, importance_weights, static_mix
from .policies import POLICIES
from .sampling import DomainSampler


STATE_FILE = "ultrafuser_stage.json"
MIX_UNITS = ("example", "token", "supervised")


@dataclass
class _StageConfig(SFTConfig):
    """What both stages share."""

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["mix_weights", "mix_policy_settings"]

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. Default: 2e-5, the paper's (section 4.1), for specialists of a billion "
            "parameters or more, and higher for smaller ones."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The paper's schedule (section 4.1)."})
    examples_per_domain: int = field(
        default=64,
        metadata={
            "help": "Examples of each domain per optimizer step, over all processes. The number of accumulated steps "
            "follows from it; `per_device_train_batch_size` says how many examples fit into memory at once."
        },
    )
    mix: str = field(
        default="balanced",
        metadata={
            "help": "How often each domain is drawn: balanced, proportional, temperature or fixed. Where a mix is "
            "learned it is what learning starts from."
        },
    )
    mix_temperature: float = field(default=10.0, metadata={"help": "For mix='temperature': 1 is proportional."})
    mix_weights: dict | str | None = field(
        default=None, metadata={"help": "For mix='fixed': domain to weight, on any scale."}
    )
    mix_unit: str = field(
        default="example", metadata={"help": f"What a share of the mix counts: one of {', '.join(MIX_UNITS)} tokens."}
    )
    mix_reward: str | None = field(
        default=None,
        metadata={"help": f"Learn the mix from this reward: {', '.join(REWARDS)}. Default: do not learn."},
    )
    mix_policy: str = field(
        default="logits", metadata={"help": f"How the mix follows rewards: {', '.join(POLICIES)}."}
    )
    mix_policy_settings: dict | str | None = field(default=None, metadata={"help": "Settings of the policy by name."})
    mix_every: int = field(default=100, metadata={"help": "Optimizer steps between two updates of the mix."})
    mix_delay: int = field(
        default=2, metadata={"help": "Optimizer steps until an update takes effect: more than the loaders read ahead."}
    )
    mix_probe: int = field(
        default=64, metadata={"help": "Training examples per domain for rewards that need passes of their own."}
    )
    mix_smoothing: float = field(default=0.9, metadata={"help": "Share of the new reward in the smoothed one."})
    mix_target: str | None = field(default=None, metadata={"help": "A domain to specialise in (MoSpec)."})
    mix_floor: float = field(default=0.05, metadata={"help": "Smallest share of any domain in a learned mix."})
    mix_max_epochs: float | None = field(
        default=None, metadata={"help": "How often a domain may be seen whole before a learned mix leaves it out."}
    )
    mix_shadow: bool = field(default=False, metadata={"help": "Learn and log the mix, and draw as if it were not."})
    mix_importance: bool = field(
        default=False, metadata={"help": "Weigh losses so that a changed mix does not change the objective."}
    )
    gate_entropy: float = field(default=0.0, metadata={"help": "Times the gate's entropy in nats, added to the loss."})
    gate_balance: float = field(
        default=0.0, metadata={"help": "Times specialists * sum of squared mean gate weights, added to the loss."}
    )
    gate_domain: float = field(
        default=0.0, metadata={"help": "Times the gate's cross-entropy to the domain's specialist: a warm start."}
    )
    gate_domain_steps: int = field(default=100, metadata={"help": "Steps over which `gate_domain` falls to 0."})

    def __post_init__(self):
        super().__post_init__()
        if self.mix_unit not in MIX_UNITS:
            raise ValueError(f"`mix_unit` must be one of {MIX_UNITS}, but is {self.mix_unit!r}.")
        if self.mix_reward is not None and self.mix_reward not in REWARDS:
            raise ValueError(f"`mix_reward` must be one of {sorted(REWARDS)} or None, but is {self.mix_reward!r}.")
        if self.mix_policy not in POLICIES:
            raise ValueError(f"`mix_policy` must be one of {sorted(POLICIES)}, but is {self.mix_policy!r}.")
        for name in ("examples_per_domain", "mix_every", "mix_delay", "mix_probe"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")


@dataclass
class GateStageConfig(_StageConfig):
    """Settings of stage one. The paper: 400 steps, 2e-5 cosine, 64 examples per domain (section 4.1)."""

    max_steps: int = field(default=400, metadata={"help": "Optimizer steps. The paper's 400 (section 4.1)."})
    # it would make frozen specialists run a second time, for gradients that nobody needs
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Of no use while specialists are frozen."})


@dataclass
class JointStageConfig(_StageConfig):
    """Settings of stage two. The paper: 2e-5 cosine, 32 examples per domain (section 4.1), converged near step 5,000."""

    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps. The paper's curves converge near 5,000."})
    examples_per_domain: int = field(
        default=32, metadata={"help": _StageConfig.__dataclass_fields__["examples_per_domain"].metadata["help"]}
    )
    gate_learning_rate: float | None = field(default=None, metadata={"help": "Of the gate. Default: learning_rate."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Of the heads. Default: learning_rate."})
    train_specialists: list[str] | None = field(
        default=None,
        metadata={"help": "Which specialists to train; the others keep backbone and head. Default: all."},
    )


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

    config_class: type[_StageConfig]
    stage: str

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: _StageConfig | None = None,
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
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        if model.config.model_type != "ultrafuser":
            raise ValueError(
                f"{name} trains a fused model, but got a {type(model).__name__}. Build one with "
                f"`UltraFuserForCausalLM.from_specialists(...)`, or train a single model with TRL's `SFTTrainer`."
            )
        train_dataset = _with_domains(train_dataset)
        self.domains = sorted(set(train_dataset["domain"]))
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
        self._choose_parameters(model, args, kwargs.get("peft_config"))
        if args.learning_rate is None:
            args.learning_rate = self.default_learning_rate(model)
        _accumulate(args, len(self.domains))
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

        self.fused = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self.fused.config.fusion == "probabilities":
            if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
                raise ValueError(
                    "With fusion='probabilities' the loss reads the head a part at a time, in the backward pass too, and "
                    "ZeRO-3 gathers it only where a whole layer runs. Train with FSDP2, or with ZeRO-2."
                )
            add_mixture_head(self.fused)
        self.fused.model.register_forward_hook(self._gather_head)
        self.fused.register_forward_hook(self._scatter_head)
        self.data_collator = _DomainCollator(self.data_collator, self.domains)
        self.sizes = np.bincount(
            [self.domains.index(d) for d in self.train_dataset["domain"]], minlength=len(self.domains)
        )
        if not self.sizes.all():
            raise ValueError(
                f"Every domain needs examples with a supervised token, but nothing is left of "
                f"{[d for d, n in zip(self.domains, self.sizes, strict=True) if not n]} once prompts are masked and "
                f"examples cut to `max_length={args.max_length}`. Look at the rows, or raise `max_length`."
            )
        self._lengths = self._mean_lengths(args.mix_unit)
        weights = [(args.mix_weights or {}).get(d, 0.0) for d in self.domains] if args.mix == "fixed" else None
        if set(args.mix_weights or {}) - set(self.domains):
            raise ValueError(f"`mix_weights` names {sorted(args.mix_weights)}, but the domains are {self.domains}.")
        self.prior = static_mix(args.mix, self.sizes, temperature=args.mix_temperature, weights=weights)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = DomainSampler(
            self.train_dataset["domain"], batch_size, self.in_examples(self.prior), seed=args.seed
        )
        self.statistics = _Statistics(len(self.domains), len(self.fused.config.specialist_names))
        self.controller = MixController(self) if args.mix_reward is not None else None
        self.add_callback(_StageCallback(self))

    def _choose_parameters(self, model: PreTrainedModel, args: _StageConfig, peft_config) -> None:
        raise NotImplementedError

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        """2e-5 for specialists of a billion parameters or more, the paper's; higher for smaller ones, as measured."""
        raise NotImplementedError

    # ---- data

    def _prepare_dataset(self, dataset, *args, **kwargs):
        """TRL's preparation, one domain at a time: no pack holds two domains, and each row keeps its domain."""
        if not isinstance(dataset, Dataset) or "domain" not in dataset.column_names:
            return super()._prepare_dataset(dataset, *args, **kwargs)
        places, parts = np.array(dataset["domain"]), []
        for name in sorted(set(dataset["domain"])):
            part = dataset.select(np.flatnonzero(places == name)).remove_columns("domain")
            part = super()._prepare_dataset(part, *args, **kwargs)
            parts.append(part.add_column("domain", [name] * len(part)))
        return concatenate_datasets(parts)

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
            counted = row[column] if unit == "token" else [i for i in row[column] if i != -100]
            lengths[self.domains.index(row["domain"])].append(len(counted))
        return np.array([np.mean(n) for n in lengths])

    def in_examples(self, mix: np.ndarray) -> np.ndarray:
        """A mix counted in `mix_unit` as one counted in examples, which is what is drawn. Shape (domains,)."""
        shares = mix / self._lengths
        return shares / shares.sum()

    # ---- loss and what is watched on the way

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, with importance weights and gate terms where asked for, and statistics by domain."""
        domain = inputs.pop("domain", None)
        if domain is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        with self.watching(own=self.controller is not None and self.controller.reads_own_specialists) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        scores, gate_weights, mask = seen["scores"], seen["gate_weights"][:, :-1], seen["scores"].label_mask
        domain = domain[:, 1:]
        own = self.own_log_probs(seen["hidden_states"], labels, domain, mask) if "hidden_states" in seen else None
        self.statistics.add(domain, mask, scores.log_probs, gate_weights, own)

        # per token, so that they are summed and normalised exactly as the loss is
        extra = 0.0
        step = self.state.global_step
        if self.args.mix_importance:
            weights = importance_weights(self.controller.mix_at(step) if self.controller else self.prior)
            weights = torch.tensor(weights, device=domain.device, dtype=scores.log_probs.dtype)
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

    def _gather_head(self, *_) -> None:
        """Lets FSDP2 make the head whole by its own means before anything multiplies by its weight.

        TRL's head does so with `full_tensor()`, whose backward pass gives each process the gradient of its own batch.
        """
        head = self.fused.get_output_embeddings()
        if hasattr(head, "unshard"):
            head.unshard()

    def _scatter_head(self, *_) -> None:
        head = self.fused.get_output_embeddings()
        if hasattr(head, "reshard") and not torch.is_grad_enabled():  # else the backward pass does
            head.reshard()

    def _whole_head(self) -> Tensor:
        """The head's weight, from all processes where each holds a part. Every process must ask at the same time."""
        weight = self.fused.lm_head.weight
        if hasattr(weight, "full_tensor"):  # FSDP2
            return weight.full_tensor()
        if hasattr(weight, "ds_id"):  # ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                return weight.detach().clone()
        return weight

    @contextmanager
    def watching(self, *, own: bool = False, hidden: bool = False):
        """Collects per-token scores and gate weights of the next forward pass, without a pass of its own.

        Args:
            own: Whether to keep every specialist's last hidden state.
            hidden: Whether to keep the backbone's.
        """
        seen: dict = {}

        def scores_of(_, __, output):
            if hasattr(output, "label_mask"):
                seen["scores"] = output

        def gate_of(_, __, output):
            seen["gate_weights"] = output.gate_weights
            if hidden:
                seen["last_hidden_state"] = output[0]

        handles = [
            self.fused.register_forward_hook(scores_of),
            self.fused.model.register_forward_hook(gate_of),
        ]
        if own:
            states = seen["hidden_states"] = [None] * len(self.fused.model.specialists)
            for k, specialist in enumerate(self.fused.model.specialists.values()):

                def state_of(_, __, output, k=k):
                    states[k] = output.last_hidden_state.detach()

                handles.append(specialist.register_forward_hook(state_of))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def own_log_probs(self, hidden_states: list[Tensor], labels: Tensor, domain: Tensor, mask: Tensor) -> Tensor:
        """What each domain's own specialist gives the labels: its head on states that are there already.

        Returns:
            Log-probabilities, 0 where nothing is supervised. Shape (batch, seq - 1).
        """
        weight = self._whole_head()
        found = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        config = self.fused.config
        edges = np.cumsum([0] + [c.hidden_size for c in config.specialists])
        cap = getattr(config, "final_logit_softcapping", None)
        for d, k in enumerate(self.own_specialists):
            chosen = mask & (domain == d)
            head = weight[:, edges[k] : edges[k + 1]]
            scores = []
            for states, targets in zip(
                hidden_states[k][:, :-1][chosen].split(1024), labels[:, 1:][chosen].split(1024), strict=True
            ):
                logits = nn.functional.linear(states.to(head.dtype), head).float()
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                scores.append(-nn.functional.cross_entropy(logits, targets, reduction="none"))
            if scores:
                found[chosen] = torch.cat(scores)
        return found

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
                        rate = rates.get(part)
                        groups.append({**group, "params": chosen, "lr": group["lr"] if rate is None else rate})
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
        for d, domain in enumerate(self.domains):
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

    def _warn(self, found: "_Sums", mix: np.ndarray) -> None:
        silent = [d for d, n in enumerate(found.tokens) if not n and mix[d] * self.sampler.batch_size >= 1]
        if silent and found.tokens.sum():
            raise ValueError(
                f"Every domain's batches must hold supervised tokens, but since the last log "
                f"{[self.domains[d] for d in silent]} held none: all its labels are -100. Look at its rows, at the chat "
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
        """As `Trainer.train`. A stage resumes from its own checkpoints only; unfinished ones are passed over."""
        self._warned: set[str] = set()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._load_state(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _load_state(self, checkpoint: str | os.PathLike) -> None:
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            raise ValueError(
                f"A stage resumes from a checkpoint that it wrote itself, but {str(checkpoint)!r} has no {STATE_FILE}: "
                f"it is another trainer's, or was cut off while being written. Choose another one, or start a new run "
                f"from its model."
            )
        state = json.loads(path.read_text())
        for key, own in self._identity().items():
            if state[key] != own:
                raise ValueError(
                    f"A stage resumes what it began, because optimizer, schedule and draws belong together, but {key} "
                    f"is {state[key]!r} in {str(checkpoint)!r} and {own!r} here. Start a new run from its model: "
                    f"{type(self).__name__}({str(checkpoint)!r}, ...)."
                )
        self.sampler.mixes = [(start, mix) for start, mix in state["mixes"]]
        self.statistics.load_state_dict(state["statistics"], self.args.process_index, self.args.world_size)
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])

    def _identity(self) -> dict:
        """What must be the same for a run to be continued."""
        return {
            "stage": self.stage,
            "domains": self.domains,
            "sizes": self.sizes.tolist(),
            "batch_size": self.sampler.batch_size,
            "seed": self.args.seed,
            "mix_reward": self.args.mix_reward,
        }

    def save_state_of_stage(self) -> None:
        """Writes what the stage knows beyond model and optimizer, after everything else and in one piece."""
        statistics = self.statistics.state_dict(self.accelerator)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            controller = None if self.controller is None else self.controller.state_dict()
            state = {
                **self._identity(),
                "mixes": self.sampler.mixes,
                "statistics": statistics,
                "controller": controller,
            }
            temporary = folder / (STATE_FILE + ".tmp")
            temporary.write_text(json.dumps(state))
            temporary.rename(folder / STATE_FILE)


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

    With `peft_config` the specialists learn through adapters and only those and the gate move.
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

    def _choose_parameters(self, model: PreTrainedModel, args: JointStageConfig, peft_config) -> None:
        names = model.config.specialist_names
        chosen = names if args.train_specialists is None else args.train_specialists
        if not set(chosen) <= set(names) or not chosen:
            raise ValueError(f"`train_specialists` must name some of {names}, but is {args.train_specialists}.")
        model.requires_grad_(True)
        self._trained = [n in chosen for n in names]
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
            for name in set(names) - set(chosen):
                model.model.specialists[name].requires_grad_(False)
            kept = _kept_columns(model, self._trained)
            model.lm_head.weight.register_hook(lambda gradient: gradient.index_fill(1, kept.to(gradient.device), 0))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As every stage's, and columns of the head that are not trained stay as they are, whatever it does to them."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and not all(self._trained):
            weight, columns, before = self.fused.lm_head.weight, _kept_columns(self.fused, self._trained), []

            @torch.no_grad()
            def put_back(*_):
                # weight decay moves what has no gradient too
                weight.index_copy_(1, columns.to(weight.device), before.pop())

            optimizer.register_step_pre_hook(lambda *_: before.append(weight.detach()[:, columns].clone()))
            optimizer.register_step_post_hook(put_back)
        return optimizer

    def default_learning_rate(self, model: PreTrainedModel) -> float:
        return scaled_rate(_specialist_size(model), 1e-3)


def scaled_rate(parameters: float, at_a_million: float) -> float:
    """A learning rate between two known points, by a power of the size of one specialist.

    Args:
        parameters: Of one specialist.
        at_a_million: The rate that was measured to suit a million parameters; the paper's 2e-5 suits a billion.
    """
    place = min(max(np.log10(parameters) - 6, 0), 3) / 3
    return float(at_a_million ** (1 - place) * 2e-5**place)


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint of a stage that was written to its end, or None if there is none."""
    if not os.path.isdir(folder):
        return None
    found = [p.parent for p in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


def _specialist_size(model: PreTrainedModel) -> float:
    return sum(p.numel() for n, p in model.named_parameters() if "fusion_gate" not in n) / len(
        model.config.specialist_names
    )


def _part(name: str) -> str:
    return "gate" if "fusion_gate" in name else "heads" if "lm_head" in name else "specialists"


def _kept_columns(model: PreTrainedModel, trained: list[bool]) -> Tensor:
    """Columns of the wide head that belong to specialists that are not trained. Shape (columns,)."""
    sizes = torch.tensor([c.hidden_size for c in model.config.specialists])
    return torch.repeat_interleave(~torch.tensor(trained), sizes).nonzero()[:, 0]


def _accumulate(args: _StageConfig, domains: int) -> None:
    """Sets the accumulated steps so that one optimizer step sees `examples_per_domain` of each domain."""
    wanted, at_once = args.examples_per_domain * domains, args.per_device_train_batch_size * args.world_size
    if wanted % at_once:
        raise ValueError(
            f"One optimizer step takes examples_per_domain={args.examples_per_domain} of {domains} domains, {wanted} "
            f"examples, but per_device_train_batch_size={args.per_device_train_batch_size} on {args.world_size} "
            f"processes takes {at_once} at once, which does not divide it. Choose a divisor of "
            f"{wanted // args.world_size if wanted % args.world_size == 0 else wanted}."
        )
    if args.gradient_accumulation_steps not in (1, wanted // at_once):
        raise ValueError(
            f"`gradient_accumulation_steps` follows from `examples_per_domain` and is {wanted // at_once} here, but it "
            f"was set to {args.gradient_accumulation_steps}. Leave it out, or change `examples_per_domain`."
        )
    args.gradient_accumulation_steps = wanted // at_once
    if getattr(args, "hf_deepspeed_config", None) is not None:
        # it was filled in with the number of accumulated steps and the learning rate of before
        args.hf_deepspeed_config = type(args.hf_deepspeed_config)(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = type(args.deepspeed_plugin)(hf_ds_config=args.hf_deepspeed_config)


class _DomainCollator:
    """Lets a collator do its work and adds the domain of every token, shape (batch, seq), to what it returns."""

    def __init__(self, collator, domains: list[str]):
        self.collator, self.places = collator, {name: i for i, name in enumerate(domains)}

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        domains = [row.get("domain") for row in rows]
        batch = self.collator([{k: v for k, v in row.items() if k != "domain"} for row in rows])
        if None in domains:
            return batch
        ids = torch.tensor([self.places[d] for d in domains])
        batch_size, length = batch["input_ids"].shape
        if batch_size == len(rows):
            batch["domain"] = ids[:, None].expand(-1, length)
        else:  # without padding all rows are one, end to end
            batch["domain"] = ids.repeat_interleave(torch.tensor([len(row["input_ids"]) for row in rows]))[None]
        return batch


@dataclass
class _Sums:
    """Sums over supervised tokens, by domain; `gate` and `top1` by domain and specialist."""

    tokens: np.ndarray
    nll: np.ndarray
    own_nll: np.ndarray
    entropy: np.ndarray
    gate: np.ndarray
    top1: np.ndarray


class _Statistics:
    """Running sums of what training batches show. Each process keeps its own; reading one adds them up."""

    def __init__(self, domains: int, specialists: int):
        self.specialists = specialists
        self.sums = torch.zeros(domains, 4 + 2 * specialists, dtype=torch.float64)
        self.read = {}  # sums when they were last read, by reader
        self.last_mean = torch.full((specialists,), 1 / specialists, dtype=torch.float64)

    @torch.no_grad()
    def add(self, domain: Tensor, mask: Tensor, log_probs: Tensor, gate_weights: Tensor, own: Tensor | None) -> None:
        """Takes in one micro-batch. Shapes (batch, seq - 1); of `gate_weights`, (batch, seq - 1, specialists)."""
        weights = gate_weights[mask].double()
        entropy = torch.special.entr(weights).sum(-1)
        top1 = nn.functional.one_hot(weights.argmax(-1), self.specialists).double()
        own = torch.zeros_like(entropy) if own is None else -own[mask].double()
        columns = [torch.ones_like(entropy), -log_probs[mask].double(), own, entropy]
        found = torch.cat([torch.stack(columns, -1), weights, top1], -1)
        totals = torch.zeros(self.sums.shape, dtype=torch.float64, device=found.device)
        self.sums += totals.index_add(0, domain[mask], found).cpu()

    def since(self, reader: str, accelerator) -> _Sums:
        """What has come in since this reader last asked, over all processes."""
        new = self.sums - self.read.get(reader, torch.zeros_like(self.sums))
        self.read[reader] = self.sums.clone()
        new = accelerator.reduce(new.to(accelerator.device), "sum").cpu().numpy()
        k = self.specialists
        return _Sums(*new[:, :4].T, gate=new[:, 4 : 4 + k], top1=new[:, 4 + k :])

    def state_dict(self, accelerator) -> list:
        """Sums of every process, so that a run on as many continues to the last digit."""
        readers = sorted(self.read)
        own = torch.stack([self.sums, *(self.read[r] for r in readers)])[None].to(accelerator.device)
        return {"readers": readers, "sums": accelerator.gather(own).cpu().tolist(), "mean": self.last_mean.tolist()}

    def load_state_dict(self, state: dict, process: int, processes: int) -> None:
        """Continues from `state_dict()`. Where the number of processes has changed, the first takes all."""
        saved = torch.tensor(state["sums"], dtype=torch.float64)
        if len(saved) != processes:
            saved = torch.cat([saved.sum(0)[None], torch.zeros(processes - 1, *saved.shape[1:], dtype=torch.float64)])
        self.sums, *read = saved[process].unbind(0)
        self.read = dict(zip(state["readers"], read, strict=True))
        self.last_mean = torch.tensor(state["mean"], dtype=torch.float64)


class _StageCallback(TrainerCallback):
    """Calls the stage at the moments it needs."""

    def __init__(self, trainer: _StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
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

    def on_save(self, args, state, control, **kwargs):
        self.trainer.save_state_of_stage()


def _with_domains(dataset: Dataset | Mapping[str, Dataset] | None) -> Dataset:
    if isinstance(dataset, Mapping):
        parts = [part.add_column("domain", [name] * len(part)) for name, part in dataset.items()]
        dataset = concatenate_datasets(parts)
    if dataset is None or "domain" not in dataset.column_names:
        columns = None if dataset is None else dataset.column_names
        raise ValueError(
            f"Batches are drawn evenly from the domains, so `train_dataset` needs a column 'domain', but its columns "
            f"are {columns}. Add one, or pass one dataset per domain: {{'text': ..., 'code': ...}}."
        )
    return dataset
