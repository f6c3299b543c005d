"""Prompts in each specialist's own chat template, around one response that they share.

The paper feeds every specialist the template that it was tuned with (Ding et al., 2024,
https://arxiv.org/abs/2403.08281), so the views of one prompt differ in words and in length; only the response is the
same for all, and only it is trained. Views are padded on the left to one length, so that every token of the response
has one position in all of them:

    text   <pad> <pad> User: 2+2? Assistant:        4 </s>
    code   <s> [INST] 2+2? [/INST]                  4 </s>
    labels -100 ...                                 4 </s>
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .template_sandbox import RenderingError, render_chat


def prompt_views(
    prompts: list[str | list[dict]],
    responses: list[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    templates: dict[str, str],
    specialist_names: list[str],
    max_length: int | None = None,
) -> BatchEncoding:
    """Renders every prompt in every specialist's chat template, and puts one response behind all views of it.

    Without responses the result goes into generation, `model.generate(**views.to(model.device))`; with them, into
    training. The response is split into tokens once and by itself, and ends with the end-of-text token. That is
    exactly how it follows the prompt when it is generated, even where a template's rendering of the whole
    conversation would have split it otherwise.

    Args:
        prompts: Each a list of messages, or text, which is one message of the user.
        responses: One per prompt. Default: none, for generation.
        tokenizer: The fused model's.
        templates: Specialist name to chat template, for example
            `{name: AutoTokenizer.from_pretrained(path).chat_template for name, path in specialists.items()}`.
        specialist_names: The order of the views, which is the model's: `model.config.specialist_names`.
        max_length: Most tokens in a view. A longer one loses the beginning of its prompt, but not the token that begins
            every text. Only a response longer than this is cut itself, at its end and with a warning.

    Returns:
        `specialist_input_ids` and `specialist_attention_mask`, of shape (batch, specialists, seq); `input_ids` and
        `attention_mask`, the view of the first specialist, of shape (batch, seq); and with responses `labels` of that
        shape: the response with its end, and -100 elsewhere.

    Raises:
        ValueError: If a template is missing, is of no specialist, or cannot render a prompt.
        TypeError: If a template or a prompt is of another type.
    """
    _check_templates(templates, specialist_names)
    if isinstance(prompts, str):
        raise TypeError(f"Prompts come as a list, but got text, {prompts[:40]!r}. Pass [prompt].")
    if responses is not None and len(responses) != len(prompts):
        raise ValueError(f"Every prompt has one response, but got {len(prompts)} prompts, {len(responses)} responses.")
    if max_length is not None and max_length < 2:
        raise ValueError(f"A view holds a prompt and a response, so `max_length` is 2 or more, but got {max_length}.")
    answers = [[] for _ in prompts] if responses is None else _response_ids(tokenizer, responses, max_length)
    conversations = [_messages(prompt, "user") for prompt in prompts]
    views = []
    for name in specialist_names:
        texts = [render(tokenizer, messages, templates[name], f"specialist {name!r}") for messages in conversations]
        rendered = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if max_length is not None:
            rooms = [max_length - len(answer) for answer in answers]
            rendered = [_last(ids, room, tokenizer.bos_token_id) for ids, room in zip(rendered, rooms, strict=True)]
        views.append([ids + answer for ids, answer in zip(rendered, answers, strict=True)])

    rows = [ids for own in zip(*views, strict=True) for ids in own]
    length = max(map(len, rows))
    # whatever token it is, the mask hides it
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    all_ids = torch.tensor([[padding] * (length - len(ids)) + ids for ids in rows]).view(len(prompts), -1, length)
    masks = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]).view_as(all_ids)
    batch = {
        "input_ids": all_ids[:, 0].clone(),
        "attention_mask": masks[:, 0].clone(),
        "specialist_input_ids": all_ids,
        "specialist_attention_mask": masks,
    }
    if responses is not None:
        batch["labels"] = torch.tensor([[-100] * (length - len(answer)) + answer for answer in answers])
    return BatchEncoding(batch)


@dataclass
class ViewCollator:
    """Makes training batches of `prompt_views` out of rows of text, for TRL's and transformers' trainers.

    Rows have `messages`, whose last turn is the assistant's response, or `prompt` and `completion`, each text or
    messages. Earlier turns belong to the prompt: the loss is that of the last response alone. Unlike in TRL, text is
    not taken as it is, but is a message to be rendered. A column `domain` is handed on as a list.

        SFTTrainer(
            model,
            SFTConfig(..., remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=rows,
            data_collator=ViewCollator(tokenizer, templates, model.config.specialist_names),
        )

    The two settings keep the trainer from making tokens of its own. It then cuts nothing either, so `max_length` is
    set here.

    Args:
        tokenizer: The fused model's.
        templates: Specialist name to chat template.
        specialist_names: The model's order, `model.config.specialist_names`.
        max_length: Most tokens in a view, as for `prompt_views`. Default: as TRL's.
    """

    tokenizer: PreTrainedTokenizerBase
    templates: dict[str, str]
    specialist_names: list[str]
    max_length: int | None = 1024

    def __post_init__(self):
        _check_templates(self.templates, self.specialist_names)

    def __call__(self, rows: list[dict]) -> BatchEncoding:
        prompts, responses = zip(*map(split_conversation, rows), strict=True)
        batch = prompt_views(list(prompts), list(responses), **vars(self))
        if "domain" in rows[0]:
            batch["domain"] = [row["domain"] for row in rows]
        return batch


def split_conversation(row: Mapping) -> tuple[list[dict], str]:
    """Splits a conversation into the messages before the last response, and the text of that response.

    Args:
        row: A dict with `messages`, or with `prompt` and `completion`, each text or a list of messages.

    Raises:
        ValueError: If there is no prompt, or no text of the assistant at the end.
    """
    if row.get("messages"):
        messages = _messages(row["messages"], "user")
    elif row.get("prompt") and row.get("completion"):
        messages = _messages(row["prompt"], "user") + _messages(row["completion"], "assistant")
    else:
        raise ValueError(
            f"An example has `messages`, or `prompt` and `completion`, but this one has only "
            f"{[key for key, value in row.items() if value]}. Rename its columns, or leave it out."
        )
    *prompt, last = messages
    response = last.get("content")
    if last["role"] != "assistant" or not isinstance(response, str) or not response.strip():
        raise ValueError(
            f"An example ends with the text of an assistant's response, which is what is learned, but this one ends "
            f"with {last['role']!r} and {response!r:.60}. Drop what comes after the last response, or leave it out."
        )
    if not prompt:
        raise ValueError(
            f"An example has a prompt before its response, but this one begins with it: {response[:40]!r}. Add the "
            f"user's turn, or leave it out."
        )
    return prompt, response


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], template: str, whose: str) -> str:
    """Renders a prompt up to where the response begins.

    Raises:
        ValueError: If the template fails, or leaves out a message of the user or the system.
    """
    way_out = "Put that text where the template has a place for it, such as the first turn of the user, or pass another template."
    try:
        text = render_chat(tokenizer, messages, template)
    except RenderingError as error:
        roles = [message.get("role") for message in messages]
        raise ValueError(
            f"A chat template must render every prompt, but that of {whose} cannot render the roles {roles}: {error}. "
            f"{way_out}"
        ) from error
    for message in messages:
        content = message.get("content")
        # templates may well leave out thoughts of earlier responses, so those are not looked for
        if message["role"] in ("system", "user") and isinstance(content, str) and content.strip() not in text:
            raise ValueError(
                f"All specialists must be told the same, but the chat template of {whose} leaves out the "
                f"{message['role']} message {content.strip()[:40]!r}. {way_out}"
            )
    return text


def _check_templates(templates: dict[str, str], specialist_names: list[str]) -> None:
    missing = [name for name in specialist_names if not templates.get(name)]
    unknown = [name for name in templates if name not in specialist_names]
    if missing or unknown:
        raise ValueError(
            f"Every specialist has one chat template, but {missing} have none, and there are templates for {unknown}, "
            f"which are no specialists. Pass one for each of {list(specialist_names)}; a specialist that was never "
            f"tuned to converse may share another's."
        )
    wrong = {name: type(t).__name__ for name, t in templates.items() if not isinstance(t, str)}
    if wrong:
        raise TypeError(
            f"A chat template is text, but got {wrong}. Of a tokenizer with several, choose one: "
            f"`tokenizer.chat_template['default']`."
        )


def _messages(value: str | list[dict], role: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) and "role" in m for m in value):
        raise TypeError(
            f"A prompt is text, or a list of messages like {{'role': 'user', 'content': ...}}, but got {value!r:.80}. "
            f"Several prompts are a list of those."
        )
    return value


def _response_ids(tokenizer, responses: list[str], max_length: int | None) -> list[list[int]]:
    """Returns the tokens of every response and its end, cut only where no room is left for one token of a prompt."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "A response ends with the end-of-text token, but the tokenizer has none. Set its `eos_token`."
        )
    all_ids = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    all_ids = [ids if ids[-1:] == [end] else [*ids, end] for ids in all_ids]
    if max_length is not None and max(map(len, all_ids)) >= max_length:
        # always the same text, so that a long training warns once
        warnings.warn(
            f"Responses are cut at their end, because max_length={max_length} leaves them no room behind one token of "
            f"the prompt. Raise `max_length`, or leave such examples out.",
            stacklevel=3,
        )
        all_ids = [ids[: max_length - 1] for ids in all_ids]
    return all_ids


def _last(ids: list[int], room: int, begin: int | None) -> list[int]:
    """Returns the last tokens, which hold the question, behind the token that begins every text of this tokenizer."""
    if len(ids) <= room:
        return ids
    # without it, many models are at a loss
    first = ids[:1] if ids[0] == begin and room > 1 else []
    return first + ids[len(ids) - room + len(first) :]
