"""Mixed examples: rows that change the domain on the way, made of pieces of the domains' own rows.

A gate that has only seen rows of one domain each learns that the domain never changes, and is late where it does.
"""

import random
from collections.abc import Mapping

from datasets import Dataset, Features, List


MIXED = "mixed"  # the domain that mixed examples are counted under
TURNS = (16, 128)  # fewest and most tokens between two changes of domain


def mixed_examples(parts: Mapping[str, Dataset], share: float, seed: int) -> Dataset:
    """Makes mixed examples of rows of tokens.

    An example begins with the beginning of a row, so with its begin token if there is one, and goes on with pieces from
    anywhere in rows of the other domains. It is as long as some row is.

    Args:
        parts: Prepared rows by domain: lists of tokens, and others of the same length such as labels.
        share: Of the mixed examples among all.
        seed: Same seed and rows, same examples.

    Returns:
        Rows with the columns that are lists of one value per token, and `seq_lengths` if there is one.

    Raises:
        ValueError: If there is only one domain, or rows hold no tokens.
    """
    if len(parts) < 2:
        raise ValueError(
            f"A mixed example changes the domain, but there is only {sorted(parts)}. Set mixed_share=0, or give another "
            f"domain."
        )
    rows = {name: part.with_format(None) for name, part in parts.items()}
    without = sorted(name for name, part in rows.items() if "input_ids" not in part.column_names)
    if without:
        raise ValueError(
            f"Mixed examples are made of tokens, but rows of {without} have no `input_ids`. Set mixed_share=0, or let the "
            f"trainer prepare the rows."
        )
    rng, names = random.Random(f"{MIXED} {seed}"), sorted(rows)
    features = rows[names[0]].features
    columns = [c for c, kind in features.items() if isinstance(kind, List) and c not in ("seq_lengths", "messages")]
    number = max(round(share / (1 - share) * sum(map(len, rows.values()))), 1)
    examples = [_example(rows, names, columns, rng) for _ in range(number)]
    made = {column: [example[column] for example in examples] for column in columns}
    if "seq_lengths" in features:
        made["seq_lengths"] = [[len(ids)] for ids in made["input_ids"]]
    return Dataset.from_dict(made, features=Features({column: features[column] for column in made}))


def _example(rows: Mapping[str, Dataset], names: list[str], columns: list[str], rng: random.Random) -> dict:
    domain = rng.choice(names)
    row = rows[domain][rng.randrange(len(rows[domain]))]
    length, start = len(row["input_ids"]), 0
    example: dict[str, list] = {column: [] for column in columns}
    while True:
        turn = min(rng.randint(*TURNS), length - len(example["input_ids"]))
        for column in columns:
            example[column] += row[column][start : start + turn]
        if len(example["input_ids"]) == length:
            return example
        domain = rng.choice([name for name in names if name != domain])
        row = rows[domain][rng.randrange(len(rows[domain]))]
        start = rng.randrange(len(row["input_ids"]))
