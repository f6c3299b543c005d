"""Scores held-out text with one model, token by token, and measures what it costs to run."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_ultrafuser.compat_ultrafuser import CACHE
from trainers.prompt_views import render, split_conversation

from ..pretrained import generating


MIXED = "mixed"  # items that need several domains at once: measured, but no part of the means
LOGITS = 2**28  # at most in a batch: 1 GiB in float32


@dataclass
class HeldOut:
    """Examples of one domain, padded on the right to one length.

    Attributes:
        input_ids: Token ids. Shape (examples, seq).
        attention_mask: 1 for tokens, 0 for padding. Shape (examples, seq).
        scored: Which tokens are predicted and counted: those behind the prompt. Shape (examples, seq).
        skipped: Rows that were too short to have any.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt(self) -> Tensor:
        """Tokens that a router may read before it decides. Shape (examples, seq)."""
        return self.attention_mask.bool() & (self.scored.cumsum(-1) == 0)

    @property
    def follows(self) -> Tensor:
        """Tokens that follow another one: all but the first and padding. Shape (examples, seq)."""
        follows = self.attention_mask.bool().clone()
        follows[:, 0] = False
        return follows

    def __getitem__(self, rows: slice) -> "HeldOut":
        """Returns some of the examples only."""
        return HeldOut(self.input_ids[rows], self.attention_mask[rows], self.scored[rows])

    def as_rows(self) -> list[dict[str, list[int]]]:
        """The examples as rows to train on: `input_ids`, and `labels` that are -100 on the prompt."""
        rows = []
        for ids, mask, scored in zip(self.input_ids, self.attention_mask.bool(), self.scored, strict=True):
            rows.append({"input_ids": ids[mask].tolist(), "labels": ids.where(scored, -100)[mask].tolist()})
        return rows


def held_out(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 1024, prompt_tokens: int = 32
) -> HeldOut:
    """Turns rows of text or conversations into examples.

    Args:
        rows: With `text`, whose first `prompt_tokens` tokens are the prompt; with `messages`, or `prompt` and
            `completion`, of which the last response is scored and all before it is the prompt; or with `input_ids`,
            treated as text.
        tokenizer: The fused model's.
        max_length: Longer examples are cut at their end, in tokens.
        prompt_tokens: Of plain text.

    Raises:
        ValueError: Naming the first row with none of the columns, or if no row has tokens behind its prompt.
    """
    ids, starts = [], []
    for number, row in enumerate(rows, 1):
        own, start = _tokens(row, number, tokenizer, prompt_tokens)
        if len(own[:max_length]) > start:
            ids.append(torch.tensor(own[:max_length]))
            starts.append(start)
    if not ids:
        raise ValueError(
            f"Held-out rows need tokens to predict behind their prompt, but none of the {len(rows)} rows has any. Change "
            f"`prompt_tokens` ({prompt_tokens}) or `max_length` ({max_length}), or choose other data."
        )
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    places = torch.arange(input_ids.shape[1])
    attention_mask = (places < torch.tensor([len(i) for i in ids])[:, None]).long()
    scored = (places >= torch.tensor(starts)[:, None]) & attention_mask.bool()
    return HeldOut(input_ids, attention_mask, scored, len(rows) - len(ids))


def _tokens(row: dict, number: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> tuple[list[int], int]:
    """Token ids of a row, and how many of them are the prompt."""
    if isinstance(row.get("text"), str):
        return tokenizer(row["text"])["input_ids"], prompt_tokens
    if row.get("input_ids") is not None:
        return list(row["input_ids"]), prompt_tokens
    if row.get("messages") or (row.get("prompt") and row.get("completion")):
        try:
            messages, response = split_conversation(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Held-out row {number} is not a conversation that ends with a response: {error}"
            ) from error
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(
                f"Held-out row {number} is a conversation, which needs one chat template, but the fused model's "
                f"tokenizer has {type(tokenizer.chat_template).__name__}. Set `tokenizer.chat_template`."
            )
        prompt = render(tokenizer, messages, tokenizer.chat_template, "the fused model's tokenizer")
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        return [*prompt_ids, *response_ids, tokenizer.eos_token_id], len(prompt_ids)
    raise ValueError(
        f"Held-out rows need `text`, `messages`, or `prompt` and `completion`, but row {number} has "
        f"{ {key: type(value).__name__ for key, value in row.items()} }."
    )


class Scores(NamedTuple):
    """Scores of one model on one domain. All of shape (examples, seq); the first token, which is not predicted, is 0.

    Attributes:
        losses: Negative log-likelihood of each token, in nats.
        correct: Whether the likeliest token was right.
        confidence: Probability of the likeliest token.
    """

    losses: Tensor
    correct: Tensor
    confidence: Tensor


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    data: HeldOut,
    *,
    batch_size: int = 16,
    before: Callable[[slice], dict | None] = lambda _: None,
    vocab_size: int | None = None,
) -> Scores:
    """Runs a model over a domain.

    Args:
        model: Any causal language model.
        data: What to measure on.
        batch_size: Examples at once; fewer where their logits would be more than `LOGITS`.
        before: Called with the rows of each batch before it is run. Returns further inputs of the model, if any.
        vocab_size: Rows of the head that are read, as when it is fused with smaller ones. Default: all.
    """
    model.eval()
    logits_of_one = data.input_ids.shape[1] * model.config.get_text_config().vocab_size
    batch_size = max(1, min(batch_size, LOGITS // logits_of_one))
    parts = []
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        more = before(rows) or {}
        ids, mask = data.input_ids[rows].to(model.device), data.attention_mask[rows].to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True, **more).logits
        log_probabilities = logits[:, :-1, :vocab_size].float().log_softmax(-1)
        losses = -log_probabilities.gather(-1, ids[:, 1:, None]).squeeze(-1)
        confidence, guess = log_probabilities.max(-1)
        parts.append((losses, guess == ids[:, 1:], confidence.exp()))
    losses, correct, confidence = (F.pad(torch.cat(part).cpu(), (1, 0)) for part in zip(*parts, strict=True))
    return Scores(losses, correct, confidence)


def mean_loss(model: PreTrainedModel, data: HeldOut) -> float:
    """Nats per token that is predicted."""
    return score(model, data).losses[data.scored].mean().item()


def mean_over_domains(losses: Mapping[str, float]) -> float:
    """Averages losses over domains. Those of mixed items are left out."""
    return mean(loss for domain, loss in losses.items() if domain != MIXED)


@torch.inference_mode()
def cost(
    model: PreTrainedModel, reference: PreTrainedModel, prompt: Tensor, *, new_tokens: int = 32, repeats: int = 3
) -> dict[str, float]:
    """Cost of running a model.

    Args:
        model: Any causal language model.
        reference: Timed in turn with it, one request each, because other jobs may slow down either.
        prompt: Token ids to begin from. Shape (1, seq).
        new_tokens: Tokens to generate greedily in each run.
        repeats: Runs, after one to warm up.

    Returns:
        `parameters` held; `parameters_per_token`, those read for each token: all but embedding tables, of which one
        row is read; `bytes` of weights; `cache_bytes_per_token`; `tokens_per_second` of one request, the median; and
        `speed`, the median of its ratios to the reference.
    """
    cache = model(input_ids=prompt.to(model.device), use_cache=True, return_dict=True)[CACHE]
    # recurrent layers and evidence keep a state of one size, whatever the length, and no keys
    pairs = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    seconds, ratios = [], []
    for _ in range(repeats + 1):
        seconds.append(_seconds(model, prompt, new_tokens))
        ratios.append(_seconds(reference, prompt, new_tokens) / seconds[-1])
    parameters = list({id(p): p for p in model.parameters()}.values())
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in parameters)
    return {
        "parameters": total,
        "parameters_per_token": total - sum(t.numel() for key, t in tables.items() if key not in heads),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "cache_bytes_per_token": sum(t.numel() * t.element_size() for pair in pairs for t in pair) // prompt.shape[1],
        "tokens_per_second": new_tokens / median(seconds[1:]),
        "speed": median(ratios[1:]),
    }


def _seconds(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float:
    prompt = prompt.to(model.device)
    # as many tokens whatever the model would say
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "stop_strings": None}
    length |= {"do_sample": False, "pad_token_id": 0}
    began = time.perf_counter()
    with generating(model):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **length)
    return time.perf_counter() - began
