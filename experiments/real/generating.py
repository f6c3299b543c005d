"""Greedy answers to many questions at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.progress import Progress


def answers(
    model,
    tokenizer,
    questions: list[str],
    longest: int,
    batch: int = 32,
    title: str = "answers",
    done: dict[int, str] | None = None,
    keep: Callable[[dict[int, str]], None] = lambda found: None,
) -> list[str]:
    """Returns a model's answer to each question in its chat template.

    Blocks of questions depend on the questions alone, so that work that goes on gives the same answers.

    Args:
        model: Any causal model of transformers, PEFT or UltraFuser.
        tokenizer: Its tokenizer, with a chat template.
        questions: What the user says, each a conversation of its own.
        longest: New tokens, at most.
        batch: Questions at a time. Those of about one length go together.
        title: What is answered, for lines of progress.
        done: Answers of blocks that were finished before, by index of the question.
        keep: Called with all answers after each block.
    """
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    blocks, found = [order[start : start + batch] for start in range(0, len(order), batch)], dict(done or {})
    todo = [block for block in blocks if not all(i in found for i in block)]
    with Progress(title, len(order), done=len(order) - sum(map(len, todo))) as progress:
        for block in todo:
            found |= dict(zip(block, _block(model, tokenizer, [prompts[i] for i in block], longest), strict=True))
            keep(found)
            progress.add(len(block))
    return [found[i] for i in range(len(prompts))]


def _block(model, tokenizer, prompts: list[str], longest: int) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
    return tokenizer.batch_decode(greedy(model, ids, mask, longest, tokenizer.eos_token_id), skip_special_tokens=True)


@torch.inference_mode()
def greedy(model, ids: Tensor, mask: Tensor, longest: int, end: int) -> list[list[int]]:
    """Returns the likeliest next tokens of each row, up to the end token. A row that has ended is read no more.

    Args:
        model: The model.
        ids: Prompts, padded on the left. Shape (rows, seq).
        mask: 1 for tokens, 0 for padding. Shape (rows, seq).
        longest: New tokens, at most.
        end: Token that ends an answer.
    """
    new: list[list[int]] = [[] for _ in ids]
    rows, cache = list(range(len(ids))), None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(longest):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            new[row].append(token)
        going = (ids[:, 0] != end).nonzero()[:, 0]
        if not len(going):
            break
        mask, positions = torch.cat([mask, mask.new_ones(len(ids), 1)], -1), positions[:, -1:] + 1
        # copying what is kept of the others takes as long as some steps with rows that have ended
        if len(going) <= 0.75 * len(ids):
            rows = [rows[i] for i in going.tolist()]
            ids, mask, positions = ids[going], mask[going], positions[going]
            cache.batch_select_indices(going)
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in new]
