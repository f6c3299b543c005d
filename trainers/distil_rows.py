"""Rows of prompts, with or without answers, as tokens: what a student is distilled on."""

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational, maybe_convert_to_chatml

from modeling_ultrafuser.log_ultrafuser import print_line

from .domains import check_kind, filled
from .rows import CHAT, FORMS, IGNORED, OLD_CHAT, PAIR, TEXT, TOKENS, form_of, problem


PROMPT = ("prompt",)
ROLES = {"human": "user", "gpt": "assistant"}  # of `conversations`


class RowReader:
    """Turns rows into `input_ids` and `labels`: on-policy the prompt alone, off-policy the answer behind it, too.

    Args:
        tokenizer: Of student and teacher.
        args: A `DistilConfig`.
        vocab_size: Token ids are below it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args, vocab_size: int):
        self.tokenizer, self.args, self.vocab_size = tokenizer, args, vocab_size

    def read(self, rows: Dataset, whose: str) -> Dataset:
        """Reads a domain, and prints how many rows are cut or left out.

        Args:
            rows: With `prompt`, `prompt` and `completion`, `messages`, plain text, or `input_ids`.
            whose: "domain 'code'", for messages.

        Raises:
            ValueError: Naming the first row that cannot be read, and why; or if none is left.
        """
        check_kind(rows, whose)
        rows = filled(rows)
        form = self._form(rows.column_names, whose)
        found = [
            self._checked(row, form, f"Row {n} of {whose}") for n, row in enumerate(rows.with_format(None), start=1)
        ]
        kept, room = [], self.args.max_length
        for prompt, answer in found:
            # an answer needs room for one token
            if (answer or not self.args.off_policy) and (room is None or len(prompt) + self.args.off_policy <= room):
                kept.append((prompt, answer if room is None else answer[: room - len(prompt)]))
        self._tell(found, kept, whose)
        ids = [prompt + answer for prompt, answer in kept]
        labels = [[IGNORED] * len(prompt) + answer for prompt, answer in kept]
        return Dataset.from_dict({"input_ids": ids, "labels": labels})

    def _tell(self, found: list[tuple], kept: list[tuple], whose: str) -> None:
        """Prints what is lost."""
        if not kept:
            raise ValueError(
                f"A student learns from answers behind prompts, but none of the {len(found)} rows of {whose} has both within "
                f"max_length={self.args.max_length}. Look at the rows, raise `max_length`, or lower `prompt_tokens`."
            )
        if len(kept) < len(found) and self.args.should_log:
            print_line(
                f"Of {len(found)} rows of {whose}, {len(found) - len(kept)} are left out: their prompts fill "
                f"`max_length={self.args.max_length}`, or nothing follows them."
            )

    def _form(self, columns: list[str], whose: str) -> tuple[str, ...]:
        before_text = FORMS[: FORMS.index(TEXT)]
        forms = (*before_text[:2], PROMPT, *before_text[2:], (self.args.dataset_text_field,))
        form = form_of(columns, forms)
        if form is None:
            raise ValueError(
                f"A student is distilled on prompts: rows have `prompt`, `prompt` and `completion`, `messages`, "
                f"`{self.args.dataset_text_field}` or `input_ids`, but those of {whose} have {columns or 'nothing'}. Rename "
                f"its columns."
            )
        if form == PROMPT and self.args.off_policy:
            raise ValueError(
                f"With off_policy=True a student learns on the rows' own answers, but {whose} has prompts alone. Add a "
                f"`completion`, or leave `off_policy` out: then the student writes the answers."
            )
        return form

    def _checked(self, row: Mapping[str, Any], form: tuple[str, ...], whose: str) -> tuple[list[int], list[int]]:
        if fault := problem(row, form, self.vocab_size):
            raise ValueError(f"{whose} {fault}. Correct it or drop it.")
        if form == TOKENS:
            return self._split(row["input_ids"], row.get("labels"))
        if form[0] == self.args.dataset_text_field and form != PROMPT:
            ids = self.tokenizer(row[form[0]])["input_ids"]
            return self._split([*ids, *self._end()] if self.args.off_policy else ids, None)
        prompt, answer = self._asked(row, form, whose)
        if not prompt:
            raise ValueError(
                f"{whose} has an empty prompt, behind which nothing can be written. Correct it or drop it."
            )
        if max(prompt + answer) >= self.vocab_size:
            raise ValueError(
                f"{whose} has the token {max(prompt + answer)}, but the vocabulary has {self.vocab_size} rows."
            )
        return prompt, answer

    def _split(self, ids: list[int], labels: list[int] | None) -> tuple[list[int], list[int]]:
        """Splits tokens where labels begin, or else behind `prompt_tokens`."""
        count = self.args.prompt_tokens
        if labels is not None and labels[0] == IGNORED:
            count = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
        return ids[:count], ids[count:] if self.args.off_policy else []

    def _asked(self, row: Mapping[str, Any], form: tuple[str, ...], whose: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of a prompt, and off-policy of its answer."""
        turns = self._turns(row, form, whose)
        chat = is_conversational(turns)
        if chat:
            turns = self._rendered(turns, row, whose)
        prompt = self.tokenizer(turns["prompt"], add_special_tokens=not chat)["input_ids"]
        if not self.args.off_policy:
            return prompt, []
        # a template writes the end of a turn itself
        end = [] if chat else self._end()
        return prompt, [*self.tokenizer(turns["completion"], add_special_tokens=False)["input_ids"], *end]

    def _turns(self, row: Mapping[str, Any], form: tuple[str, ...], whose: str) -> dict[str, Any]:
        """Returns `prompt`, and off-policy `completion`: both text, or both messages."""
        columns = PAIR if self.args.off_policy else PROMPT
        if form in (PAIR, PROMPT):
            return {column: row[column] for column in columns}
        messages = row[CHAT[0]] if form == CHAT else _chat(row[form[0]])
        ends = messages[-1]["role"] == "assistant"
        prompt, completion = (messages[:-1], messages[-1:]) if ends else (messages, [])
        if not prompt or (self.args.off_policy and not completion):
            raise ValueError(
                f"{whose} has {'no answer' if prompt else 'no prompt'}: its messages are of {[m['role'] for m in messages]}. "
                f"Correct it or drop it."
            )
        return {column: {"prompt": prompt, "completion": completion}[column] for column in columns}

    def _rendered(self, turns: dict[str, Any], row: Mapping[str, Any], whose: str) -> dict[str, str]:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{whose} is a conversation, but the teacher's tokenizer has no chat template to write it with. Set "
                f"`tokenizer.chat_template`, or give prompts as text."
            )
        tools = row.get("tools")
        tools, more = json.loads(tools) if isinstance(tools, str) else tools, row.get("chat_template_kwargs") or {}
        try:
            return apply_chat_template({**turns, "chat_template_kwargs": more}, self.tokenizer, tools)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{whose} cannot be rendered by the chat template: {reason}. Correct it or drop it."
            ) from error

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]


def _chat(turns: list[dict]) -> list[dict]:
    """Returns turns of {"from", "value"} as messages."""
    messages = maybe_convert_to_chatml({OLD_CHAT[0]: turns})["messages"]
    return [{**message, "role": ROLES.get(message["role"], message["role"])} for message in messages]
