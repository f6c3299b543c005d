"""Settings of distillation: TRL's, and what `DistilTrainer` adds to them."""

from dataclasses import dataclass, field

from trl import DistillationConfig

from .checked_config import CheckedConfig
from .compat import dict_settings
from .mix.mix_config import check_counts
from .samplers import SAMPLERS


@dataclass
class DistilConfig(CheckedConfig, DistillationConfig):
    """Settings of distillation: TRL's `DistillationConfig`, and those here.

    `by_label` is MOPD (Ma et al., 2026, arXiv 2606.30406), `balance_scale` DN-MOPD, see `Feedback`.
    """

    _VALID_DICT_FIELDS = dict_settings(DistillationConfig)

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate. Default: by the student's size, 2e-5 from a billion parameters on."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints: resuming needs one."})
    examples_per_domain: int = field(
        default=32,
        metadata={
            "help": "Examples of each domain per optimizer step, over all processes. The number of accumulated steps "
            "follows from it; `per_device_train_batch_size` says how many examples fit into memory at once."
        },
    )
    sampler: str = field(
        default="stratified", metadata={"help": f"How a batch is drawn from the domains: {', '.join(SAMPLERS)}."}
    )
    off_policy: bool = field(
        default=False,
        metadata={"help": "Learn on the rows' own answers. Default: on what the student writes (on-policy)."},
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Divergence: 0 is KL(teacher, student), 1 is KL(student, teacher), between them Jensen-Shannon. "
            "Default: 1 on-policy, 0 off-policy."
        },
    )
    by_label: bool = field(
        default=False,
        metadata={"help": "Each domain's own specialist teaches it, in place of the fused model (MOPD)."},
    )
    balance_scale: bool = field(
        default=True,
        metadata={"help": "Scale losses so that the teacher's feedback spreads alike in all domains (DN-MOPD)."},
    )
    mixed_share: float = field(
        default=0.0,
        metadata={
            "help": "Off-policy: share of every batch that changes the domain on the way, pieces of the domains' rows "
            "end to end."
        },
    )
    prompt_tokens: int = field(
        default=32,
        metadata={"help": "First tokens that are the prompt, of plain text and of token ids without labels."},
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest row in tokens: answers are cut, rows with longer prompts are left out."},
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})

    def __post_init__(self):
        if self.beta is None:
            self.beta = 0.0 if self.off_policy else 1.0
        super().__post_init__()
        self.check_types(DistilConfig.__annotations__)
        self.check_machine()
        self.check_schedule()
        check_counts(self, ("examples_per_domain", "prompt_tokens", "max_completion_length"))
        self._check_choices()

    def _check_choices(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"`sampler` must be one of {sorted(SAMPLERS)}, but is {self.sampler!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"A row holds a prompt and an answer, so `max_length` is at least 2, but is {self.max_length}."
            )
        if not 0 <= self.mixed_share < 1:
            raise ValueError(
                f"`mixed_share` is a share of every batch and leaves room for the domains, so it must be at least 0 and "
                f"below 1, but is {self.mixed_share}."
            )
        if self.mixed_share and (self.by_label or not self.off_policy):
            raise ValueError(
                "A mixed example is made of given answers and has no domain of its own, but `mixed_share` came "
                f"{'with by_label=True' if self.by_label else 'without off_policy=True'}. Leave one of them out."
            )
        if self.push_to_hub:
            raise ValueError(
                "`push_to_hub` of a trainer would send all that is in its output folder, pickled arguments included. "
                "Upload the student when it is trained: `hf upload OWNER/NAME FOLDER`."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` would change the batch size in mid-run, but draws are counted in batches. Lower "
                "`per_device_train_batch_size` by hand: the number of accumulated steps follows."
            )
