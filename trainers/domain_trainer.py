"""TRL's `SFTTrainer` on data of several domains: prepared one domain at a time, drawn in the proportions of a mix."""

import copy

import numpy as np
from datasets import Dataset, IterableDataset, List, Value
from torch.utils.data import Sampler
from trl import SFTTrainer, is_conversational

from modeling_ultrafuser.log_ultrafuser import print_line

from .domains import Losses, by_domain, check_kind, filled, readable, together
from .mixed import MIXED, mixed_examples, with_share
from .samplers.sampler_base import DomainSampler
from .stage_config import StageConfig


class DomainTrainer(SFTTrainer):
    """How rows of several domains become batches. `StageTrainer` says what is trained on them.

    Attributes:
        domains: Names of the domains, in alphabetical order.
        drawn: What batches are drawn from: the domains and, last, mixed examples where a share of a batch is such.
        sampler: Draws them.
    """

    domains: list[str]
    drawn: list[str]
    sampler: DomainSampler
    _stand_in: Dataset | None = None

    def _given(self, parts: dict[str, Dataset], dataset, args: StageConfig) -> Dataset:
        """What TRL is given: all rows if it takes them as they are, or else one domain, in whose place all are prepared."""
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            if args.mixed_share:
                parts = {**parts, MIXED: mixed_examples(parts, args.mixed_share, data_seed(args))}
            return dataset if isinstance(dataset, Dataset) and not args.mixed_share else together(parts)
        # TRL looks at the first row for assistants
        self._parts, first = parts, next(iter(parts.values()))
        conversations = (p for p in parts.values() if args.assistant_only_loss and is_conversational(p[0]))
        self._stand_in = next(conversations, first).select([0])
        return self._stand_in

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's preparation, one domain at a time: domains are in forms of their own, and no pack holds two of them."""
        if isinstance(dataset, IterableDataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        check_kind(dataset, f"`{dataset_name}` dataset")
        settings = (processing_class, args, packing, formatting_func)
        if dataset is self._stand_in:
            parts = self._parts
        elif "domain" in dataset.column_names:
            parts = by_domain(dataset)
        else:
            return self._prepare_rows(dataset, dataset_name, *settings)
        prepared = {name: self._prepare_rows(parts[name], f"domain {name!r}", *settings) for name in sorted(parts)}
        nothing = [name for name, part in prepared.items() if not len(part)]
        if dataset is self._stand_in and nothing:
            raise ValueError(
                f"Every domain needs examples with a supervised token, but nothing is left of {nothing} once prompts are "
                f"masked and examples cut to `max_length={args.max_length}`. Look at the rows, or raise `max_length`."
            )
        if dataset is self._stand_in and args.mixed_share:
            prepared[MIXED] = mixed_examples(prepared, args.mixed_share, data_seed(args))
        return together(prepared)

    def _prepare_rows(self, rows: Dataset, whose: str, processing_class, args, packing, formatting_func) -> Dataset:
        """TRL's preparation of one form of rows, and a line on what it leaves out."""
        if not len(rows):
            raise ValueError(f"There are no rows in {whose}. Look at what was loaded, or leave it out.")
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
        if losses.empty == losses.rows:
            rows = rows.select([])
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


def data_seed(args: StageConfig) -> int:
    """The seed of mixed examples and of what is held out, where first weights and draws have another."""
    return args.seed if args.data_seed is None else args.data_seed
