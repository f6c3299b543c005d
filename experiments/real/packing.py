"""Puts many short conversations into one row that share the system message, each blind to the others.

Every conversation is read as if it stood alone: it attends to the shared beginning and to itself, and its positions go
on from the beginning's. So the system message is computed once for a row, not once for an answer.
"""

from random import Random
from typing import NamedTuple

import torch
from torch import Tensor


IGNORED = -100


class Example(NamedTuple):
    """A tokenised conversation without the shared beginning.

    Attributes:
        ids: Its tokens.
        labels: The same, IGNORED where nothing is learned.
    """

    ids: list[int]
    labels: list[int]


class Batch(NamedTuple):
    """Packed rows.

    Attributes:
        input_ids: (rows, length).
        position_ids: (rows, length).
        mask: Which token sees which, (rows, 1, length, length), boolean.
        labels: (rows, length), IGNORED where nothing is learned; for the token that stands there.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    labels: Tensor


def shared_start(tokenizer) -> list[int]:
    """Tokens that every conversation begins with."""
    one, two = (_tokens(tokenizer, [{"role": "user", "content": text}]) for text in ("1", "x"))
    same = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    turn = one.index(tokenizer.bos_token_id, 1) if tokenizer.bos_token_id in one[1:] else same
    return one[: min(turn, same)]


def tokenised(tokenizer, messages: list[dict], start: int) -> Example:
    """A conversation's tokens behind the shared beginning; only answers and their ends are learned."""
    ids, labels = [], []
    for turn in range(1, len(messages), 2):
        asked = _tokens(tokenizer, messages[:turn], add_generation_prompt=True)
        answer = tokenizer(messages[turn]["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        question = asked[start + len(ids) :]
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
    return Example(ids, labels)


def _tokens(tokenizer, messages: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def rows_of(examples: list[Example], room: int, random: Random, most_open: int = 16) -> list[list[Example]]:
    """All examples in random order, as many in a row as fit.

    Args:
        examples: Those longer than `room` are left out.
        room: Tokens of a row behind the shared beginning.
        random: The order's source.
        most_open: Rows that wait for an example that still fits.
    """
    order = [example for example in examples if len(example.ids) <= room]
    random.shuffle(order)
    full, rows = [], []
    for example in order:
        row = next((row for row in rows if row[0] >= len(example.ids)), None)
        if row is None:
            if len(rows) == most_open:
                rows.sort(key=lambda row: row[0])
                full.append(rows.pop(0))
            row = [room, []]
            rows.append(row)
        row[0] -= len(example.ids)
        row[1].append(example)
    return [examples for _, examples in full + rows]


def collate(rows: list[list[Example]], start: list[int], length: int, pad: int) -> Batch:
    """Rows as tensors of one length."""
    parts = [_row(row, start, length, pad) for row in rows]
    ids, positions, owners, labels = (torch.tensor(column) for column in zip(*parts, strict=True))
    same = owners[:, :, None] == owners[:, None, :]
    seen = same | (owners == 0)[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(ids, positions, (seen & causal)[:, None], labels)


def _row(row: list[Example], start: list[int], length: int, pad: int):
    ids, labels = list(start), [IGNORED] * len(start)
    positions, owners = list(range(len(start))), [0] * len(start)
    for owner, example in enumerate(row, 1):
        ids += example.ids
        labels += example.labels
        positions += range(len(start), len(start) + len(example.ids))
        owners += [owner] * len(example.ids)
    rest = length - len(ids)
    return ids + [pad] * rest, positions + [0] * rest, owners + [-1] * rest, labels + [IGNORED] * rest
