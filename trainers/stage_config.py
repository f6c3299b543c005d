"""Settings of the two stages: TRL's, with the paper's defaults, and what a stage adds to them."""

import re
from dataclasses import dataclass, field

import numpy as np
from trl import SFTConfig

from .checked_config import CheckedConfig
from .compat import dict_settings, renew_deepspeed
from .mix.mix_config import MixConfig, check_counts


MIXED_SHARE, GATE_DROPOUT = 0.25, 0.1  # of stage one, where they can be
GATE_SCALE = 0.5  # half the square of a log factor: a standard normal prior
EVAL_STEPS = 25  # between two measurements of held-out rows
# optimizers that count their steps over all parameters, or go back through the model themselves
WHOLE_STEPS = re.compile(r"schedule_free|lomo|adalomo|.*layerwise")


@dataclass
class StageConfig(CheckedConfig, MixConfig, SFTConfig):
    """Settings that both stages share: TRL's, those of the mix, and those here."""

    _VALID_DICT_FIELDS = dict_settings(SFTConfig) + ["mix_weights", "mix_policy_settings", "gate_groups"]

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. Default: 2e-5, the paper's (section 4.1), for specialists of a billion "
            "parameters or more, and higher for smaller ones."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The paper's schedule (section 4.1)."})
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Learn what the assistant says alone, of rows with `messages`. Default: yes if the chat template marks "
            "it with {% generation %}, or TRL knows the template. Rows with `prompt` and `completion` learn the latter."
        },
    )
    examples_per_domain: int = field(
        default=64,
        metadata={
            "help": "Examples of each domain per optimizer step, over all processes. The number of accumulated steps "
            "follows from it; `per_device_train_batch_size` says how many examples fit into memory at once."
        },
    )
    mixed_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of every batch that changes the domain on the way: pieces of the domains' rows, end to end, "
            "which teach the gate to follow such changes. Default: 0.25 in stage one if there are two domains, else 0."
        },
    )
    gate_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Probability with which training hides each number that the gate reads of hidden states. Default: 0.1 in "
            "stage one if it reads any, else 0."
        },
    )
    early_stopping: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many measurements of held-out rows without a lower loss, and keep the best. Measured every "
            "`eval_steps`, with a checkpoint each time."
        },
    )
    held_out: float = field(
        default=0.1,
        metadata={
            "help": "For `early_stopping` without an `eval_dataset`: share of each domain's rows that is held out."
        },
    )
    gate_entropy: float = field(default=0.0, metadata={"help": "Times the gate's entropy in nats, added to the loss."})
    gate_balance: float = field(
        default=0.0,
        metadata={"help": "Times specialists * sum of squared mean gate weights, 1 if even, added to the loss."},
    )
    gate_scale: float | None = field(
        default=None,
        metadata={
            "help": "Times the squares of the log factors that a gate with `+calibration` multiplies logits by, added to the "
            "loss: a prior for factors of 1, which text that says how sure to be outweighs. Default: 0.5, a standard normal "
            "prior, in TRL's own loss."
        },
    )
    gate_domain: float = field(
        default=0.0, metadata={"help": "Times the gate's cross-entropy to the domain's specialist: a warm start."}
    )
    gate_domain_steps: int = field(
        default=100,
        metadata={
            "help": "Steps over which `gate_domain` falls to 0. With many more than are trained it stays as it is."
        },
    )
    gate_domain_target: str = field(
        default="domain",
        metadata={
            "help": "Whom `gate_domain` goes by: `domain` for the domain's own specialist, or `best` for the one that predicts "
            "each token best, which needs no names of domains, and one pass of every specialist's head."
        },
    )
    gate_groups: dict | str | None = field(
        default=None,
        metadata={
            "help": "Names of specialists and domains by group, {world: [text], task: [code, math]}: `gate_balance` then "
            "balances specialists within groups more than between them."
        },
    )
    gate_groups_strength: float = field(
        default=0.1,
        metadata={
            "help": "How much more a specialist counts in domains of its group, and less in others. LoRAMoE's 0.1."
        },
    )

    def __post_init__(self):
        if self.early_stopping is not None:
            self.eval_strategy = self.save_strategy = "steps"
            self.save_steps = self.eval_steps = self.eval_steps or EVAL_STEPS
            self.load_best_model_at_end, self.metric_for_best_model = True, "eval_loss"
        super().__post_init__()
        self.check_types(MixConfig.__annotations__ | StageConfig.__annotations__)
        self.check_machine()
        self.check_schedule()
        self.check_mix()
        self._check_shares()
        check_counts(self, ("examples_per_domain", "early_stopping"))

    def _check_shares(self):
        if not 0 <= (self.mixed_share or 0) < 1:
            raise ValueError(
                f"`mixed_share` is a share of every batch and leaves room for the domains, so it must be at least 0 and "
                f"below 1, but is {self.mixed_share}."
            )
        if not 0 <= (self.gate_dropout or 0) < 1:
            raise ValueError(f"`gate_dropout` is a probability below 1, but is {self.gate_dropout}.")
        if self.gate_domain_target not in ("domain", "best"):
            raise ValueError(f"`gate_domain_target` is 'domain' or 'best', but is {self.gate_domain_target!r}.")
        if not 0 <= self.gate_groups_strength < 1:
            raise ValueError(
                f"`gate_groups_strength` is taken from 1 for domains of other groups, so it is at least 0 and below 1, but is "
                f"{self.gate_groups_strength}."
            )
        groups = self.gate_groups or {}
        lists = isinstance(groups, dict) and all(isinstance(own, list | tuple) for own in groups.values())
        if not lists or not all(isinstance(name, str) for own in groups.values() for name in own):
            raise ValueError(f"`gate_groups` holds a list of names by group, but is {str(groups)[:200]!r}.")
        if self.gate_groups and not self.gate_balance:
            raise ValueError(
                "`gate_groups` say how `gate_balance` balances, but that is 0. Set it, or leave them out."
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` is a share of each domain's rows, between 0 and 1, but is {self.held_out}.")


@dataclass
class GateStageConfig(StageConfig):
    """Settings of stage one. The paper: 400 steps, 2e-5 cosine, 64 examples per domain (section 4.1).

    Weight decay, dropout and mixed examples are not the paper's, but measured, see "How long to train a gate" in
    EXPERIMENTS.md. The paper's stage sets all three to 0.
    """

    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay. Default: 0.1."})
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps. The paper's 400 (section 4.1)."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints: resuming needs one."})
    # it would make frozen specialists run a second time, for gradients that nobody needs
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Useless while specialists are frozen."})


@dataclass
class JointStageConfig(StageConfig):
    """Settings of stage two. The paper: 2e-5 cosine, 32 examples per domain (section 4.1), converged near step 5,000."""

    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps. The paper's curves converge near 5,000."})
    examples_per_domain: int = field(
        default=32, metadata=StageConfig.__dataclass_fields__["examples_per_domain"].metadata
    )
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the gate. Default: learning_rate."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the heads. Default: learning_rate."}
    )
    train_specialists: list[str] | None = field(
        default=None,
        metadata={"help": "Which specialists to train; the others keep backbone and head. Default: all."},
    )
    train_only: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression: of what would be trained, train parameters whose whole name it matches, the gate's "
            "(`.*fusion_gate.*`) included. Default: all."
        },
    )
    one_specialist_at_a_time: bool = field(
        default=False,
        metadata={
            "help": "Go back through one specialist after another and update each before the next: activations and "
            "gradients of one are in memory, for one more forward pass of each. `max_grad_norm` then bounds every "
            "specialist's gradients on their own, and those of gate and heads together. One process only."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_types({"train_only": str | None})
        if not self.one_specialist_at_a_time:
            return
        found = {name: getattr(self, name) for name in ("fp16", "torch_compile", "activation_offloading", "deepspeed")}
        found |= {"optim": self.optim.value} if WHOLE_STEPS.match(self.optim.value) else {}
        if any(found.values()):
            raise ValueError(
                "`one_specialist_at_a_time` runs and updates specialists outside of the model's own backward pass, so "
                "it goes without loss scaling, compiled models, offloaded activations, DeepSpeed and optimizers that "
                f"must see all gradients at once, but got { ({n: v for n, v in found.items() if v}) }. Use bf16 "
                f"or optim='adamw_torch', say, or leave it out."
            )


@dataclass
class SingleStageConfig(StageConfig):
    """Settings of training a single model. Mixture-of-Skills: about 4,850 steps of 64 examples of four sets."""

    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    examples_per_domain: int = field(
        default=16, metadata=StageConfig.__dataclass_fields__["examples_per_domain"].metadata
    )


def scaled_rate(parameters: float, at_a_million: float) -> float:
    """Returns a learning rate for the size of a specialist, interpolated between two measured ones.

    Args:
        parameters: Number of parameters of one specialist.
        at_a_million: The rate for a million parameters; the paper's 2e-5 is that for a billion.
    """
    share = min(max(np.log10(parameters) - 6, 0), 3) / 3
    return float(at_a_million ** (1 - share) * 2e-5**share)


def accumulate(args: StageConfig, domains: int) -> None:
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
    renew_deepspeed(args)
