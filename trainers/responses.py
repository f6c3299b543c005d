"""Decides whether all turns of conversations are learned, or what the assistant says alone."""

import re
from collections.abc import Mapping

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml

from modeling_ultrafuser.log_ultrafuser import print_line

from .rows import CHAT, OLD_CHAT, form_of_row, problem


def conversation(parts: Mapping[str, Dataset]) -> Dataset | None:
    """Returns the first row of the first domain of `messages`, or of `conversations` as `messages`; None without any."""
    for part in parts.values():
        row = part.with_format(None)[0]
        form = form_of_row(row)
        if form in (CHAT, OLD_CHAT) and problem(row, form) is None:
            return Dataset.from_list([{"messages": maybe_convert_to_chatml(row)["messages"]}])
    return None


def learns_responses(parts: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase | str) -> bool:
    """Returns the default of `assistant_only_loss`: as the paper (Wu et al., 2024, Eq. 1), wherever that can be told.

    Prints a line where rows are conversations and nothing tells what the assistant says.

    Args:
        parts: Rows by domain.
        tokenizer: What renders them, or its folder or Hub id.
    """
    if conversation(parts) is None:
        return False
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if marks_responses(tokenizer):
        return True
    print_line(
        "All turns of the conversations are learned, those of the user included: the chat template does not mark what the "
        "assistant says. Put it between {% generation %} and {% endgeneration %}, or write rows with `prompt` and "
        "`completion`; `assistant_only_loss=False` learns all turns without this line."
    )
    return False


def marks_responses(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the chat template marks what the assistant says, or TRL knows it and a marked one like it."""
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template or re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return bool(template)
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:
        return False
