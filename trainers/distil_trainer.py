"""Distils a fused model into one ordinary model, on TRL's `DistillationTrainer`.

A fused model is a learned combination of teachers, token by token. The student reads prompts of all domains and writes
answers (on-policy), or reads given ones (off-policy), and is pulled towards the teacher's whole prediction at every token
of them (Agarwal et al., 2024, arXiv 2306.13649).
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .compat_distillation import HookedDistillationTrainer
from .distil_checks import check_pair, loaded
from .distil_config import DistilConfig
from .distil_rows import RowReader
from .divergences import next_token_logits, token_divergences
from .domain_scale import Feedback
from .domains import by_domain, together
from .mixed import MIXED, mixed_examples
from .resumable import Resumable
from .rows import IGNORED
from .samplers import SAMPLERS
from .stage_checkpoint import EndedError
from .stage_config import accumulate, scaled_rate


RATE_AT_A_MILLION = 1e-3


class DistilTrainer(Resumable, HookedDistillationTrainer):
    """Trains a student to predict what its teacher predicts. Batches hold as many examples of each domain.

    Any fusion rule that has a loss can teach, for it reads logits or log-probabilities alone; so can any other model of the same
    tokenizer. The logits of `per_device_train_batch_size` examples are in memory at once. One process, or DDP.

    Args:
        model: The student, its folder or its Hub id. It is trained in place.
        teacher_model: The fused model, its folder or its Hub id. It is not changed.
        args: The settings.
        train_dataset: A dataset with a column `domain`, or one dataset per domain name. Rows have `prompt`, `prompt` and
            `completion`, `messages`, `text` or `input_ids`.
        processing_class: Tokenizer of both.
        **kwargs: `callbacks` and `optimizers`, as for `Trainer`.

    Raises:
        ValueError: If student, teacher, rows and settings do not go together.

    Attributes:
        domains: Names of the domains, in alphabetical order.
        drawn: What batches are drawn from: the domains, and last "mixed" if `mixed_share` is above 0.
        sampler: Draws the training examples.
        feedback: Sums of the teacher's feedback by domain, and the domains' factors.
    """

    stage = "distil"
    config_class = DistilConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str,
        args: DistilConfig | None = None,
        train_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        args = DistilConfig(type(self).__name__) if args is None else args
        parts = by_domain(train_dataset)
        self.domains = sorted(parts)
        student = loaded(model, args, args.model_init_kwargs)
        teacher = loaded(teacher_model, args, args.teacher_model_init_kwargs)
        check_pair(student, teacher, args, self.domains)
        if args.learning_rate is None:
            args.learning_rate = scaled_rate(sum(p.numel() for p in student.parameters()), RATE_AT_A_MILLION)
        accumulate(args, len(self.domains))
        reader = RowReader(processing_class, args, teacher.config.get_text_config().vocab_size)
        rows = {name: reader.read(parts[name], f"domain {name!r}") for name in self.domains}
        if args.mixed_share:
            rows[MIXED] = mixed_examples(
                rows, args.mixed_share, args.seed if args.data_seed is None else args.data_seed
            )
        self.drawn = list(rows)
        args.model_init_kwargs = args.teacher_model_init_kwargs = None
        super().__init__(
            student, teacher, args, train_dataset=together(rows), processing_class=processing_class, **kwargs
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Student and teacher are read whole, but FSDP and DeepSpeed give each process a part of them. Train on one "
                "process, or with DDP."
            )
        self._teachers()
        self._begin()
        self.add_callback(_DistilCallback(self))

    def _teachers(self) -> None:
        """Sets who teaches which domain: the teacher, or its specialists."""
        teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
        self.teachers = (
            {name: teacher.specialist(name).eval() for name in self.domains} if self.args.by_label else None
        )

    def _begin(self) -> None:
        """Resets sampler and feedback to their state before the first step."""
        args, names = self.args, self.train_dataset["domain"]
        self.sizes = np.bincount([self.drawn.index(name) for name in names], minlength=len(self.drawn))
        shares = np.full(len(self.domains), (1 - args.mixed_share) / len(self.domains))
        mix = np.append(shares, args.mixed_share) if args.mixed_share else shares
        at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps
        draws = SAMPLERS[args.sampler](names, at_once * args.world_size, mix, args.seed, self.drawn)
        # TRL reads the rows of a whole step at every one of its parts
        self.draws, self.sampler = draws, Repeated(draws, args.gradient_accumulation_steps)
        self.feedback = Feedback(len(self.drawn))

    # ---- batches

    def completed(self, rows: list[dict]) -> dict[str, Tensor]:
        """Makes a batch of rows: given answers, or those that the student writes. See `HookedDistillationTrainer`.

        Returns:
            `input_ids`, `attention_mask` and `trained`, whether a token is trained; shapes (batch, seq), padded on the
            right. `domain`, shape (batch,). `num_items_in_batch`, a number.
        """
        ids, trained = [row["input_ids"] for row in rows], [[i != IGNORED for i in row["labels"]] for row in rows]
        if not self.args.off_policy:
            answers = self.generate(ids)
            trained = [[False] * len(i) + [True] * len(a) for i, a in zip(ids, answers, strict=True)]
            ids = [i + a for i, a in zip(ids, answers, strict=True)]
        padding = self.processing_class.pad_token_id
        batch = {
            "input_ids": _padded(ids, padding),
            "attention_mask": _padded([[1] * len(i) for i in ids], 0),
            "trained": _padded(trained, False),
            "domain": torch.tensor([self.drawn.index(row["domain"]) for row in rows]),
        }
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        return {**batch, "num_items_in_batch": self.accelerator.gather(batch["trained"][:, 1:].sum()).sum()}

    # ---- loss

    def token_loss(self, student: nn.Module, inputs: dict[str, Tensor], num_items) -> tuple[Tensor, Tensor, Tensor]:
        """Compares student and teacher on the trained tokens. See `HookedDistillationTrainer`."""
        ids, mask, trained = inputs["input_ids"], inputs["attention_mask"], inputs["trained"]
        start = max(int(trained.any(0).float().argmax()) - 1, 0)
        chosen = trained[:, start + 1 :]
        own = next_token_logits(student, ids, mask, start)[chosen]
        with torch.no_grad():
            its = self._taught(ids, mask, inputs["domain"], start)[chosen]
        settings = {"beta": self.beta, "temperature": self.temperature}
        losses, gaps, entropies = token_divergences(own, its, ids[:, start + 1 :][chosen], **settings)
        domain = inputs["domain"][:, None].expand_as(chosen)[chosen]
        if self.model.training:
            self.feedback.add(domain, losses, gaps)
        factors = self.feedback.factors.to(losses.device)[domain] if self.args.balance_scale else 1
        return (factors * losses).sum() / num_items, entropies.sum(), chosen.sum()

    def _taught(self, ids: Tensor, mask: Tensor, domain: Tensor, start: int) -> Tensor:
        """Returns the teachers' logits behind `start`. Shape (batch, seq - start - 1, vocab)."""
        if self.teachers is None:
            return next_token_logits(self.accelerator.unwrap_model(self.teacher_model), ids, mask, start)
        taught = None
        for d, name in enumerate(self.domains):
            rows = domain == d
            if rows.any():
                logits = next_token_logits(self.teachers[name], ids[rows], mask[rows], start)
                taught = logits.new_empty(len(ids), *logits.shape[1:]) if taught is None else taught
                taught[rows] = logits
        return taught

    # ---- logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, for every domain, divergence, tokens, epochs and the factor of its loss."""
        if "loss" in logs:
            sums, epochs = self.feedback.new("log", self.accelerator), self.draws.epochs(self.state.global_step)
            for d, name in enumerate(self.drawn):
                tokens = sums[d, 0]
                told = {"tokens": tokens, "epochs": epochs[d], "scale": self.feedback.factors[d]}
                told |= {"loss": sums[d, 1] / tokens} if tokens else {}
                logs |= {f"{key}/{name}": round(float(value), 6) for key, value in told.items()}
        super().log(logs, start_time)

    def identity(self) -> dict:
        """Returns what must be the same in a checkpoint for a run to resume from it."""
        names = ("sampler", "off_policy", "beta", "by_label", "balance_scale", "temperature")
        return {**super().identity(), **{name: getattr(self.args, name) for name in names}}

    def progress(self) -> dict:
        """Returns the state of the feedback."""
        return {"feedback": self.feedback.state_dict(self.accelerator)}

    def restore(self, state: dict) -> None:
        """Restores what `progress` returned."""
        self.feedback.load_state_dict(state["feedback"], self.args.process_index, self.args.world_size)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes no card: TRL's knows nothing of the specialists. `ultrafuser distil` writes the student's."""


class Repeated(Sampler[int]):
    """Draws each batch of a `DomainSampler` several times in a row.

    Args:
        draws: What is repeated.
        times: How often.
    """

    def __init__(self, draws, times: int):
        self.draws, self.times = draws, times
        self.batch_size = draws.batch_size

    def __len__(self) -> int:
        return len(self.draws) * self.times

    @property
    def batches_drawn(self) -> int:
        """Returns the number of the first batch that is not drawn yet."""
        return self.draws.batches_drawn

    def __iter__(self) -> Iterator[int]:
        batch: list[int] = []
        for index in self.draws:
            batch.append(index)
            if len(batch) == self.batch_size:
                yield from batch * self.times
                batch = []


def _padded(rows: list[list], padding) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)


class _DistilCallback(TrainerCallback):
    """Calls the trainer when a run or an epoch begins, and after each step."""

    def __init__(self, trainer: DistilTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise EndedError

    def on_epoch_begin(self, args, state, control, **kwargs):
        draws = self.trainer.draws
        draws.set_epoch(state.global_step // draws.batches_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.feedback.renew(self.trainer.accelerator)
