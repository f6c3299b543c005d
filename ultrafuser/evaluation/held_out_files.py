"""Reads held-out examples from JSON Lines files and from data sets of the Hub."""

import itertools
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from trainers.rows import CHAT, PAIR, TEXT, TOKENS, form_of_row

from ..row_files import fault_of, load_set, parse
from ..source_names import is_file, split_source
from .measurement import MIXED, HeldOut, held_out


def read_domains(
    sources: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, *, examples: int, **limits
) -> dict[str, HeldOut]:
    """Reads the examples of several domains.

    Args:
        sources: A JSON Lines file, or a data set of the Hub as `id` or `id:split`, by domain. Rows have `text`, `messages`,
            or `prompt` and `completion`.
        tokenizer: The models'.
        examples: Most rows of each domain.
        limits: `max_length` and `prompt_tokens` of `held_out`.

    Raises:
        ValueError: If a row is malformed, or a domain has no tokens to predict.
        OSError: If a file or a set cannot be read.
    """
    return {d: _read(d, source, tokenizer, examples, limits) for d, source in sources.items()}


def check_domains(domains: Mapping[str, str]) -> None:
    """Rejects data whose every domain is kept out of the mean.

    Raises:
        ValueError: If there is no domain but "mixed".
    """
    if not set(domains) - {MIXED}:
        raise ValueError(f"The mean is over the domains that are not {MIXED!r}, but there is no other. Pass one more.")


def _read(domain: str, source: str, tokenizer: PreTrainedTokenizerBase, examples: int, limits: dict) -> HeldOut:
    whose = f"domain {domain!r}"
    if is_file(source):
        rows = _rows(source, whose, examples)
    else:
        name, split = split_source(source)
        stream = load_set({"path": name, "split": split or "test", "streaming": True}, whose)
        rows = list(stream.take(examples))
    if not rows:
        raise ValueError(f"{source}: no row is in it, but {whose} needs some. Look at how it was made.")
    try:
        return held_out(rows, tokenizer, **limits)
    except ValueError as error:
        raise ValueError(f"{domain}, {source}: {error}") from error


def _rows(file: str, whose: str, limit: int) -> list[dict]:
    rows, forms = [], (TEXT, TOKENS, CHAT, PAIR)
    for place, row in itertools.islice(parse(file, whose), limit):
        if fault := fault_of(row, form_of_row(row, forms), forms):
            raise ValueError(f"{place}: this row of {whose} {fault}. Correct it or drop it.")
        rows.append(row)
    return rows
