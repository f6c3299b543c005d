"""TRL's `SFTTrainer` for data of several domains: prepares one domain at a time, and draws in the proportions of a mix."""

import copy

import numpy as np
from datasets import Dataset, IterableDataset, List, Value

from modeling_ultrafuser.log_ultrafuser import print_line

from .compat import HookedSFTTrainer, model_columns
from .domains import by_domain, check_kind, filled, lost_examples, readable, together
from .mixed import MIXED, mixed_examples
from .responses import conversation
from .samplers import DomainSampler
from .stage_config import StageConfig


class DomainTrainer(HookedSFTTrainer):
    """Makes batches of the rows of several domains. `StageTrainer` chooses what is trained on them.

    Attributes:
        domains: Names of the domains, in alphabetical order.
        drawn: What batches are drawn from: the domains, and last "mixed" if `mixed_share` is above 0.
        sampler: Draws the training examples.
    """

    domains: list[str]
    drawn: list[str]
    sampler: DomainSampler
    _responses_by_default = False
    _stand_in: Dataset | None = None

    def _rows_for_trl(self, parts: dict[str, Dataset], dataset, args: StageConfig) -> Dataset:
        """Returns what TRL is given: all rows if they need no preparation, else one row, which `prepare` replaces by all."""
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            if args.mixed_share:
                parts = {**parts, MIXED: mixed_examples(parts, args.mixed_share, data_seed(args))}
            return dataset if isinstance(dataset, Dataset) and not args.mixed_share else together(parts)
        # TRL looks at the first row for assistants
        self._parts, first = parts, next(iter(parts.values()))
        self._stand_in = (conversation(parts) if args.assistant_only_loss else None) or first.select([0])
        return self._stand_in

    def prepare(self, dataset, whose: str, processing_class, args, packing, formatting_func):
        """Prepares one domain at a time: each may have its own form of rows, and no pack mixes two domains."""
        settings = (processing_class, args, packing, formatting_func)
        if isinstance(dataset, IterableDataset):
            return self.prepare_as_trl(dataset, whose, *settings)
        check_kind(dataset, f"`{whose}` dataset")
        if dataset is self._stand_in:
            parts = self._parts
        elif "domain" in dataset.column_names:
            parts = by_domain(dataset)
        else:
            return self._prepare_rows(dataset, whose, *settings)
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
        """Prepares rows of one form as TRL does, and prints how many are cut or dropped."""
        if not len(rows):
            raise ValueError(f"There are no rows in {whose}. Look at what was loaded, or leave it out.")
        rows = filled(rows)
        if formatting_func is None:
            rows = readable(rows, whose, args, self.vocab_size)
        if args.completion_only_loss is None:
            self.completion_only_loss = {"prompt", "completion"} <= set(rows.column_names)
        # tokens first, as long as they are
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        if self._responses_by_default and {"prompt", "completion"} <= set(rows.column_names):
            # learned as it would be beside domains of any other form
            uncut.assistant_only_loss = False
        rows = self.prepare_as_trl(rows, whose, processing_class, uncut, False, formatting_func)
        max_length = None if packing and args.packing_strategy != "bfd" else args.max_length
        lost, all_lost = lost_examples(rows, max_length, args.truncation_mode == "keep_end")
        if lost and args.should_log:
            print_line(f"Of {len(rows)} rows of {whose}, {lost}.")
        rows = self.prepare_as_trl(rows, whose, processing_class, args, packing, None)
        if all_lost:
            rows = rows.select([])
        if args.remove_unused_columns:
            columns = model_columns(self)
            rows = rows.select_columns([c for c in rows.column_names if c in columns])
        for column in {"input_ids", "labels"} & set(rows.column_names):
            if rows.features[column] != (tokens := List(Value("int64"))):
                rows = rows.cast_column(column, tokens)
        return rows

    def _mean_lengths(self, unit: str) -> np.ndarray:
        """Returns the mean length of each domain's examples, in `unit`. Shape (domains,)."""
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
        """Converts a mix in `mix_unit` to one in examples, and adds the share of mixed examples. Shape (drawn,)."""
        shares, mixed = mix / self._lengths, self.args.mixed_share
        shares = shares / shares.sum()
        return np.append(shares * (1 - mixed), mixed) if mixed else shares


def data_seed(args: StageConfig) -> int:
    """Returns the seed of mixed examples and held-out rows: `data_seed`, or `seed` if there is none."""
    return args.seed if args.data_seed is None else args.data_seed
