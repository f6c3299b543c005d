"""Selects examples to train on by instruction-following difficulty (IFD).

How much does the prompt help a model to predict the response? IFD is the model's loss on the response behind its prompt,
divided by its loss on the response alone (Li et al., 2024, "From Quantity to Quality", https://arxiv.org/abs/2308.12032).
Near 0 the prompt gives everything away; near 1 it hardly helps, and there is something to learn; above 1 it misleads,
mostly because prompt and response do not belong together.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .forward_hooks import evaluating
from .prompt_views import render, split_conversation
from .template_sandbox import render_chat


@torch.no_grad()
def ifd_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | Sequence[dict],
    batch_size: int = 8,
    *,
    max_length: int = 2048,
) -> list[float]:
    """Scores every example by how little its prompt helps `model` to predict its response.

    Both losses are means over the same tokens, those of the response without its end, in nats per token and float32.
    Alone, the response stands behind what the chat template puts before every response, as behind "### Response:" in
    the paper's code, or else behind the token that begins, or ends, every text.

    Any causal language model scores: a fused one, `model.specialist(name)`, or a small one. The paper first trains it
    briefly on a few examples of the data, so that it knows the format.

    Args:
        model: The model that predicts, on any device.
        tokenizer: Its tokenizer, with a chat template.
        dataset: Rows with `messages`, or `prompt` and `completion`, as for `ViewCollator`.
        batch_size: Examples at a time.
        max_length: Most tokens of prompt and response together, as in the paper's scripts.

    Returns:
        One score per example, in order. NaN for an example without prompt or response, or too long, with one warning
        that tells the reasons.

    Raises:
        ValueError: If no example can be scored, or the chat template cannot render a prompt.
    """
    scores = torch.full((len(dataset),), torch.nan)
    template, left_out = tokenizer.get_chat_template(), {}
    # rows of like length go together, the longest first: if memory does not suffice, that shows at once
    sizes = [len(str(dataset[i])) for i in range(len(dataset))]
    order = sorted(range(len(dataset)), key=sizes.__getitem__, reverse=True)
    with evaluating(model), tqdm(total=len(dataset), desc="IFD", unit="example") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            triples = {}
            for i in rows:
                try:
                    conversation = split_conversation(dataset[i])
                except ValueError as error:
                    left_out[i] = str(error)
                    continue
                prompt, header, response = _tokens(tokenizer, template, *conversation)
                if len(prompt) + len(response) > max_length:
                    left_out[i] = f"An example has at most max_length={max_length} tokens, but this one has more."
                else:
                    triples[i] = prompt, header, response
            if triples:
                behind_prompt = _mean_losses(model, [(prompt, response) for prompt, _, response in triples.values()])
                alone = _mean_losses(model, [(header, response) for _, header, response in triples.values()])
                scores[list(triples)] = (behind_prompt / alone).cpu()
            bar.update(len(rows))
    if left_out:
        reasons = "; ".join(
            f"{number} like row {min(i for i, r in left_out.items() if r == reason)}: {reason}"
            for reason, number in Counter(left_out.values()).most_common(3)
        )
        if len(left_out) == len(dataset):
            raise ValueError(f"No example of {len(dataset)} can be scored: {reasons}")
        warnings.warn(f"{len(left_out)} of {len(dataset)} examples get no score: {reasons}", stacklevel=2)
    return scores.tolist()


def select_by_ifd(dataset: Dataset, scores: Sequence[float], share: float) -> Dataset:
    """Keeps each domain's most difficult examples, in their old order.

    Examples above 1 are dropped first, as in the paper, and so are those without a score. A domain that then has fewer
    examples left than its share keeps them all.

    Args:
        dataset: Rows with a column `domain`.
        scores: One per row, from `ifd_scores`.
        share: Part of each domain's rows to keep, above 0 and up to 1; rounded, and at least one example. It is of all
            rows, so domains keep their proportions; the paper's code takes it of those not dropped.

    Raises:
        ValueError: If there is no such column, not one score per row, or a domain would lose every example.
    """
    if "domain" not in dataset.column_names:
        raise ValueError(
            f"The share is taken of each domain, which column 'domain' tells, but the columns are "
            f"{dataset.column_names}. Add it."
        )
    if len(scores) != len(dataset):
        raise ValueError(f"Every row has one score, but got {len(scores)} scores for {len(dataset)} rows.")
    if not 0 < share <= 1:
        raise ValueError(f"`share` is the part of the rows to keep, above 0 and up to 1, but got {share}.")
    members = defaultdict(list)
    for i, domain in enumerate(dataset["domain"]):
        members[domain].append(i)
    kept = []
    for domain, rows in members.items():
        # NaN is not at most 1 either
        difficult = sorted((i for i in rows if scores[i] <= 1), key=scores.__getitem__, reverse=True)
        if not difficult:
            raise ValueError(
                f"Every domain keeps some examples, but of {domain!r} none has a score of at most 1, out of "
                f"{len(rows)}. Score with another model, or leave that domain out before."
            )
        kept += difficult[: max(1, round(share * len(rows)))]
    return dataset.select(sorted(kept))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict], response: str
) -> tuple[list[int], list[int], list[int]]:
    """Returns tokens of the prompt, of what the template puts before every response, and of the response."""
    prompt = render(tokenizer, messages, template, "the tokenizer")
    unprompted = render_chat(tokenizer, messages, template, prompt=False)
    header = prompt.removeprefix(unprompted) if prompt.startswith(unprompted) else ""
    prompt, header, response = tokenizer([prompt, header, response], add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id
    if prompt[0] == begin:
        header = [begin, *header]
    # the first token of the response must be predicted from something
    return prompt, header or [tokenizer.eos_token_id if begin is None else begin], response


def _mean_losses(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    """Returns the mean loss in nats per token of each response behind its context. Shape (batch,)."""
    # padded on the right, whatever the tokenizer does: no token sees what comes after it, so this needs no mask, and
    # positions count from 0
    ids = pad_sequence([torch.tensor(context + response) for context, response in pairs], batch_first=True)
    labels = [torch.tensor([-100] * len(context) + response) for context, response in pairs]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    logits = model(input_ids=ids.to(model.device), use_cache=False, return_dict=True).logits[:, :-1]
    labels = labels.to(logits.device)
    counted = labels != -100
    losses = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    return torch.zeros(counted.shape, device=logits.device).masked_scatter(counted, losses).sum(-1) / counted.sum(-1)
