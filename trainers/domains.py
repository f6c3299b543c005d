"""Domains of examples: from the given data to the tokens of a batch."""

from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Split, concatenate_datasets
from torch import Tensor

from .rows import BESIDE, BESIDE_TOKENS, FORMS, TEXT, TOKENS, form_of, names, problem


def by_domain(dataset: Dataset | Mapping[str, Dataset] | None) -> dict[str, Dataset]:
    """Splits data into one dataset per domain, each without a column `domain`.

    Raises:
        ValueError: If rows name no domain, or a domain is empty or no `Dataset`.
    """
    if isinstance(dataset, Mapping) and not (isinstance(dataset, DatasetDict) and _splits(dataset)):
        for name, part in dataset.items():
            check_kind(part, f"domain {name!r}")
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"A domain has a name, but one of {list(dataset)} is {name!r}. Name it.")
        parts = {n: p.remove_columns("domain") if "domain" in p.column_names else p for n, p in dataset.items()}
    else:
        if dataset is not None:
            check_kind(dataset, "`train_dataset`")
        parts = _by_column(dataset)
    empty = [name for name, part in parts.items() if not len(part)]
    if empty or not parts:
        what = f"domain {empty[0]!r} has no rows" if empty else "there are none"
        raise ValueError(
            f"Batches are drawn from every domain, but {what}. Look at what was loaded, or leave the domain out."
        )
    return parts


def _by_column(dataset: Dataset | None) -> dict[str, Dataset]:
    if dataset is None or "domain" not in dataset.column_names:
        columns = None if dataset is None else dataset.column_names
        raise ValueError(
            f"Batches are drawn evenly from the domains, so `train_dataset` needs a column 'domain', but its columns "
            f"are {columns}. Add one, or pass one dataset per domain: {{'text': ..., 'code': ...}}."
        )
    column = dataset.with_format(None)["domain"][:]
    for number, domain in enumerate(column, start=1):
        if not isinstance(domain, str | int) or not str(domain).strip():
            raise ValueError(
                f"Row {number} of `train_dataset` has the domain {domain!r}, but every row is of a domain that has a "
                f"name. Fill it in, or drop the row: `dataset.filter(lambda row: row['domain'])`."
            )
    names_of_rows, rows = np.array(column), dataset.remove_columns("domain")
    return {name: rows.select(np.flatnonzero(names_of_rows == name)) for name in sorted(set(column))}


def _splits(dataset: Mapping) -> set[str]:
    return set(dataset) & {str(split) for split in (Split.TRAIN, Split.VALIDATION, Split.TEST)}


def check_kind(dataset, whose: str) -> None:
    """Checks that data is a `Dataset`: not all splits at once, a stream, or a list.

    Args:
        dataset: The data.
        whose: "domain 'code'", for the message.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(dataset, Dataset):
        return
    kind, way_out = type(dataset).__name__, "Make it one: `Dataset.from_list(rows)`, say"
    if isinstance(dataset, Mapping):
        kind = f"{kind} of {list(dataset)}"
        way_out = "Choose a split: `load_dataset(..., split='train')`, or `[...]` of what was loaded"
    elif hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"):
        way_out = (
            "A mix of domains needs to count its examples, which a stream does not tell: load it without "
            "`streaming=True`; a Dataset is read from disk as needed, too"
        )
    raise ValueError(
        f"{whose[:1].upper()}{whose[1:]} must be a `datasets.Dataset`, but got {'an' if kind[0] in 'IO' else 'a'} {kind}. "
        f"{way_out}."
    )


def split(parts: Mapping[str, Dataset], share: float, seed: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Splits each domain's rows into those to train on, and a share that is held out.

    Raises:
        ValueError: If a domain has too few rows.
    """
    train, held_out = {}, {}
    for domain in sorted(parts):
        rows = parts[domain].shuffle(seed=seed)
        count = round(share * len(rows))
        if not 0 < count < len(rows):
            raise ValueError(
                f"Each domain is measured on rows that nothing is trained on, {share:.0%} of them, but {domain!r} has only "
                f"{len(rows)} rows. Give it at least {round(0.5 / share) + 1}."
            )
        held_out[domain] = rows.select(range(count))
        train[domain] = rows.select(range(count, len(rows)))
    return train, held_out


def filled(rows: Dataset) -> Dataset:
    """Drops columns of nulls: they are other domains', from when all were concatenated."""
    plain = rows.with_format(None)
    empty = [c for c, value in plain[0].items() if value is None and all(v is None for v in plain[c])]
    return rows.remove_columns(empty)


def readable(rows: Dataset, whose: str, args, vocab_size: int) -> Dataset:
    """Checks a domain's rows, and returns them with the columns that are read.

    Args:
        rows: Of one domain.
        whose: "domain 'code'", for messages.
        args: The stage's settings: which column is plain text, and whether columns that are not read are dropped.
        vocab_size: Token ids are below it.

    Raises:
        ValueError: Naming the first row that cannot be read, and why.
    """
    columns, text_field = rows.column_names, args.dataset_text_field
    form = form_of(columns, (*FORMS[: FORMS.index(TEXT)], (text_field,)))
    if form is None or {"image", "images"} & set(columns):
        raise ValueError(
            f"Rows have `messages`, `prompt` and `completion`, `{text_field}`, or `input_ids`, and no images, but those "
            f"of {whose} have {columns or 'nothing in any column'}. Rename its columns."
        )
    read = [c for c in columns if c in (*form, *(BESIDE_TOKENS if form == TOKENS else BESIDE))]
    for number, row in enumerate(rows.with_format(None).select_columns(read), start=1):
        if fault := problem(row, form, vocab_size):
            raise ValueError(
                f"Row {number} of {whose} {fault}. Every row of a domain is trained on, so correct it or drop it; rows of "
                f"another form can be a domain of their own."
            )
    return rows.select_columns(read) if args.remove_unused_columns else rows


def together(parts: Mapping[str, Dataset]) -> Dataset:
    """Concatenates domains into one dataset with a column `domain`.

    Raises:
        ValueError: If a column has another type in another domain.
    """
    named = [part.add_column("domain", [name] * len(part)) for name, part in parts.items()]
    try:
        return concatenate_datasets(named)
    except ValueError as error:
        kinds: dict[str, tuple] = {}
        for name, part in parts.items():
            for column, kind in part.features.items():
                other, before = kinds.setdefault(column, (name, kind))
                if before != kind:
                    raise ValueError(
                        f"Rows that the trainer does not prepare must have one type in each column, but {names([column])} "
                        f"differs: {before} in domain {other!r}, {kind} in domain {name!r}. Bring them to one form, or let "
                        f"the trainer prepare them: without `skip_prepare_dataset` and `remove_unused_columns=False`."
                    ) from error
        raise


def lost_examples(rows: Dataset, max_length: int | None, keep_end: bool) -> tuple[str, bool]:
    """Describes how many of a domain's examples are cut or have nothing left to learn; returns whether all have nothing.

    Args:
        rows: Of tokens that are not cut yet.
        max_length: Length that examples are cut to, or None.
        keep_end: Whether to keep the end of a cut example, not its beginning.
    """
    kept = slice(None) if max_length is None else slice(-max_length, None) if keep_end else slice(max_length)
    cut = empty = 0
    for row in rows.with_format(None).select_columns(["input_ids", "labels"]):
        cut += max_length is not None and len(row["input_ids"]) > max_length
        # nothing predicts the first token
        empty += all(label == -100 for label in row["labels"][kept][1:])
    found = [f"{cut} are longer than `max_length={max_length}` and are cut"] if cut else []
    if empty:
        found.append(f"{empty} hold nothing to learn, because all that is left of them is prompt or a single token")
    return " and ".join(found), empty == len(rows)


class DomainCollator:
    """Collates rows with another collator, and adds the domain of every token, shape (batch, seq)."""

    def __init__(self, collator, domains: list[str]):
        self.collator, self.indices = collator, {name: i for i, name in enumerate(domains)}

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        indices = [self.indices.get(row.get("domain")) for row in rows]
        batch = self.collator([{k: v for k, v in row.items() if k != "domain"} for row in rows])
        if None in indices:  # evaluation on something else
            return batch
        ids = torch.tensor(indices)
        batch_size, length = batch["input_ids"].shape
        if batch_size == len(rows):
            batch["domain"] = ids[:, None].expand(-1, length)
        else:  # without padding all rows are one, end to end
            of_tokens = ids.repeat_interleave(torch.tensor([len(row["input_ids"]) for row in rows]))
            batch["domain"] = torch.nn.functional.pad(of_tokens, (0, length - len(of_tokens)))[None]
        return batch
