"""Greedy answers to many questions at a time."""

import sys
import time

import torch


@torch.no_grad()
def answers(model, tokenizer, questions: list[str], longest: int, batch: int = 32, every: float = 60) -> list[str]:
    """Returns a model's answer to each question in its chat template.

    Args:
        model: Any causal model of transformers, PEFT or UltraFuser.
        tokenizer: Its tokenizer, with a chat template.
        questions: What the user says, each a conversation of its own.
        longest: New tokens, at most.
        batch: Questions at a time. Those of about one length go together.
        every: Seconds between two lines of progress.
    """
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies, shown = [""] * len(prompts), time.monotonic()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        inputs.pop("token_type_ids", None)
        output = model.generate(
            **inputs,
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, reply in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            replies[i] = reply
        if time.monotonic() - shown > every:
            print(f"{start + len(chosen)} of {len(order)} answered", file=sys.stderr, flush=True)
            shown = time.monotonic()
    return replies
