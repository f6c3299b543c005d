"""Which domain an example is of, from the data that is given to the tokens of a batch."""

from collections.abc import Mapping

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor


def with_domains(dataset: Dataset | Mapping[str, Dataset] | None) -> Dataset:
    """One dataset with a column `domain`, out of one that has it or of one dataset per domain name.

    Raises:
        ValueError: If the domains are not told, or the examples cannot be counted.
    """
    given = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    if any(isinstance(part, IterableDataset) for part in given):
        raise ValueError(
            "A mix of domains needs to know its examples, which a stream does not tell, but got an IterableDataset. "
            "Load it without `streaming=True`; a Dataset is read from disk as needed too."
        )
    if isinstance(dataset, Mapping):
        parts = [p.remove_columns("domain") if "domain" in p.column_names else p for p in given]
        parts = [part.add_column("domain", [name] * len(part)) for name, part in zip(dataset, parts, strict=True)]
        dataset = concatenate_datasets(parts)
    if dataset is None or "domain" not in dataset.column_names:
        columns = None if dataset is None else dataset.column_names
        raise ValueError(
            f"Batches are drawn evenly from the domains, so `train_dataset` needs a column 'domain', but its columns "
            f"are {columns}. Add one, or pass one dataset per domain: {{'text': ..., 'code': ...}}."
        )
    return dataset


class DomainCollator:
    """Lets a collator do its work and adds the domain of every token, shape (batch, seq), to what it returns."""

    def __init__(self, collator, domains: list[str]):
        self.collator, self.places = collator, {name: i for i, name in enumerate(domains)}

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        places = [self.places.get(row.get("domain")) for row in rows]
        batch = self.collator([{k: v for k, v in row.items() if k != "domain"} for row in rows])
        if None in places:  # evaluation on something else
            return batch
        ids = torch.tensor(places)
        batch_size, length = batch["input_ids"].shape
        if batch_size == len(rows):
            batch["domain"] = ids[:, None].expand(-1, length)
        else:  # without padding all rows are one, end to end
            of_tokens = ids.repeat_interleave(torch.tensor([len(row["input_ids"]) for row in rows]))
            batch["domain"] = torch.nn.functional.pad(of_tokens, (0, length - len(of_tokens)))[None]
        return batch
