"""Answers generated from a local folder with transformers, in a journal."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from trainers.prompt_views import render

from ..pretrained import generating, load_model, load_tokenizer
from .answers import AnswerJournal, messages_of
from .questions import Question


def answer_locally(
    folder: Path,
    questions: list[Question],
    journal: AnswerJournal,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    batch_size: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Generates what the journal lacks with transformers, turn by turn, in the tokenizer's chat template.

    Args:
        folder: Of any causal language model with its tokenizer.
        questions: To answer.
        journal: Gets `answer` and `finish`: "stop", or "length" where the answer was cut.
        max_new_tokens: Of each answer; fewer where the model's context ends.
        temperature: 0 is greedy.
        batch_size: Answers generated at once.
        advance: Called after each answer.

    Raises:
        ValueError: If there is no chat template.
    """
    turns = max(len(q.turns) for q in questions)
    waiting = [[q for q in questions if len(q.turns) > t and (q.id, t) not in journal.rows] for t in range(turns)]
    tokenizer = load_tokenizer(folder, padding_side="left")
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            f"Questions are put in the model's chat template, but the tokenizer in {str(folder)!r} has none. Set "
            f"`tokenizer.chat_template` and save it there, or serve the model with a template."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, dtype="auto").to(device).eval()
    set_seed(0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for turn, pending in enumerate(waiting):
        # alike in length, so that a batch holds little padding
        conversations = {q.id: messages_of(q, turn, journal) for q in pending}
        prompts = {id: render(tokenizer, c, tokenizer.chat_template, "model") for id, c in conversations.items()}
        ids = sorted(prompts, key=lambda id: len(prompts[id]))
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            said = _generate(model, tokenizer, [prompts[id] for id in batch], max_new_tokens, sampling)
            for id, (answer, finish) in zip(batch, said, strict=True):
                journal.add(id, turn, answer=answer, finish=finish)
                advance()


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_new_tokens: int, sampling: dict
) -> list[tuple[str, str]]:
    """The answer to each prompt, and why it ended."""
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    length = batch["input_ids"].shape[1]
    room = min(max_new_tokens, (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - length)
    if room < max_new_tokens and len(texts) > 1:
        # a long prompt must not take room from the others
        return [_generate(model, tokenizer, [text], max_new_tokens, sampling)[0] for text in texts]
    if room <= 0:
        return [("", "length")]
    with generating(model):
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,
            **sampling,
        )[:, length:]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=output.device).view(-1)
    stopped = torch.isin(output, ends).any(-1).tolist()
    stops = model.generation_config.stop_strings or []
    stopped = [
        s or any(stop in a for stop in stops) for s, a in zip(stopped, tokenizer.batch_decode(output), strict=True)
    ]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [(a.strip(), "stop" if s else "length") for a, s in zip(answers, stopped, strict=True)]
