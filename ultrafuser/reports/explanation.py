"""Who speaks: what the gate, each specialist and the fused model make of a text, token by token."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserForCausalLM

from ..pretrained import generating, prompt_ids


FUSED = "fused"


@dataclass
class Candidate:
    """A token that a model holds likely.

    Attributes:
        text: The token, decoded by itself.
        probability: Its probability.
    """

    text: str
    probability: float


@dataclass
class Token:
    """One token of a text and who predicted it.

    What speaks for a token is read one position before it, where it was predicted: its gate weights are
    `outputs.gate_weights[:, i - 1]`. Nobody predicts the first token of a text, so its fields are empty.

    Attributes:
        text: What the token adds to the text: nothing, if it only begins a character that a later one completes.
        id: Its id.
        generated: Whether the fused model wrote it.
        weights: Gate weight of each specialist, by name.
        probabilities: Probability of this token under each specialist and under the fused model ("fused").
        candidates: Likeliest tokens of each specialist and of the fused model ("fused"), best first.
        spreads: Standard deviation of the logits over the vocabulary, of each specialist and of the fused model ("fused").
    """

    text: str
    id: int
    generated: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    probabilities: dict[str, float] = field(default_factory=dict)
    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)

    @property
    def leader(self) -> str | None:
        """The specialist with the largest weight, of either sign, or None for the first token."""
        return max(self.weights, key=lambda name: abs(self.weights[name]), default=None)


@torch.inference_mode()
def explain(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    generate: int = 0,
    candidates: int = 4,
    chat: bool = False,
) -> list[Token]:
    """Runs a fused model and each of its specialists over a text.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        text: What to explain, or with `generate` the prompt.
        generate: Tokens to continue the text by, greedily. Explained like the others.
        candidates: Likeliest tokens to keep of each specialist and of the fused model.
        chat: Whether the prompt is a question, asked through the chat template if the tokenizer has one.

    Returns:
        The tokens. Their texts joined are the text, up to what the tokenizer adds or drops; of a chat they are question and
        answer without what the template puts around them.

    Raises:
        ValueError: If there is no token that was predicted from another one, the text is too long for the model, or a
            question is not to be answered.
    """
    if chat and not generate:
        raise ValueError(
            "A question of a chat is there to be answered: say with `generate` by how many tokens at most."
        )
    chat = chat and tokenizer.chat_template is not None
    conversation = [{"role": "user", "content": text}]
    ids = prompt_ids(tokenizer, conversation) if chat else tokenizer(text, return_tensors="pt")["input_ids"]
    ids, prompt = ids.to(model.device), ids.shape[-1]
    _check_length(model, prompt, generate)
    model.eval()
    if generate:
        mask = torch.ones_like(ids)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        settings = {"max_new_tokens": generate, "do_sample": False, "pad_token_id": pad, "tokenizer": tokenizer}
        with generating(model):
            ids = model.generate(ids, attention_mask=mask, **settings)
    outputs = model(input_ids=ids, use_cache=False, return_dict=True)
    gate_weights, logits = outputs.gate_weights[0, :-1].tolist(), outputs.logits
    del outputs

    pieces = zip(text_pieces(ids[0].tolist(), tokenizer), ids[0].tolist(), strict=True)
    tokens = [Token(piece, i, generated=place >= prompt) for place, (piece, i) in enumerate(pieces)]
    names = model.config.specialist_names
    for token, weights in zip(tokens[1:], gate_weights, strict=True):
        token.weights = dict(zip(names, weights, strict=True))
    # one model at a time, because over a large vocabulary probabilities fill the memory
    _add_predictions(tokens, FUSED, logits, ids, tokenizer, candidates)
    del logits
    for name in names:
        logits = model.specialist(name)(input_ids=ids, use_cache=False, return_dict=True).logits
        _add_predictions(tokens, name, logits, ids, tokenizer, candidates)
    return _conversation(tokens[prompt:], text, tokenizer) if chat else tokens


def _conversation(answer: list[Token], question: str, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """Puts the question, without its template, before the answer, without the token that ends it."""
    asked = tokenizer(f"{question}\n", add_special_tokens=False)["input_ids"]
    if len(answer) > 1 and answer[-1].id in tokenizer.all_special_ids:
        answer = answer[:-1]
    return [*map(Token, text_pieces(asked, tokenizer), asked), *answer]


def text_pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text that each token adds. Joined, they are the decoded text.

    A token of byte-level BPE may hold a part of a character only. It adds nothing then, and the token that completes
    the character adds all of it.
    """

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    # tokens are decoded together with those before them, because many tokenizers drop the space that begins a text
    pieces, context, read, known = [], 0, 0, ""
    for end in range(1, len(ids) + 1):
        decoded = decode(ids[context:end])
        # an incomplete character decodes to the replacement character
        whole = decoded if end == len(ids) else decoded.rstrip("\ufffd")
        pieces.append(whole[len(known) :])
        known = whole
        if whole == decoded:
            context, read = read, end
            known = decode(ids[context:read])
    return pieces


def leaders(tokens: list[Token]) -> list[str | None]:
    """Who leads at each token; nobody at the first one, nor in a prompt that the model continued."""
    continued = any(token.generated for token in tokens)
    return [token.leader if token.generated or not continued else None for token in tokens]


def mean_weights(tokens: list[Token]) -> dict[str, float]:
    """Mean gate weight of each specialist, over the tokens at which somebody leads."""
    return _means([token.weights for token in _led(tokens)])


def mean_spreads(tokens: list[Token]) -> dict[str, float]:
    """Mean spread of the logits of each specialist and of the fused model, over the tokens at which somebody leads."""
    return _means([token.spreads for token in _led(tokens)])


def _led(tokens: list[Token]) -> list[Token]:
    return [token for token, leader in zip(tokens, leaders(tokens), strict=True) if leader]


def _means(numbers: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(own[name] for own in numbers) / len(numbers) for name in numbers[0]}


def are_signed(weights: dict[str, float]) -> bool:
    """Returns whether weights are no shares: one is below 0, or they do not sum to 1."""
    return min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 0.01


def _add_predictions(
    tokens: list[Token], name: str, logits: Tensor, ids: Tensor, tokenizer: PreTrainedTokenizerBase, candidates: int
) -> None:
    """Predictions of one model at every position but the last."""
    # the "contrast" rule cuts tokens off: theirs are minus infinity
    spreads = [row[row.isfinite()].float().std(correction=0).item() for row in logits[0, :-1]]
    probabilities = logits[0, :-1].float().softmax(-1)
    own = probabilities.gather(-1, ids[0, 1:, None].to(probabilities.device))[:, 0].tolist()
    top = probabilities.topk(min(candidates, probabilities.shape[-1]))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    for token, probability, spread, (found, values) in zip(tokens[1:], own, spreads, likeliest, strict=True):
        token.probabilities[name], token.spreads[name] = probability, spread
        token.candidates[name] = [Candidate(tokenizer.decode(i), p) for i, p in zip(found, values, strict=True)]


def _check_length(model: UltraFuserForCausalLM, prompt: int, generate: int) -> None:
    if prompt + generate < 2 or prompt == 0:
        raise ValueError(
            f"A token is explained by what predicted it from the tokens before, so a text needs two tokens, but this one "
            f"has {prompt}. Pass a longer text, or continue it with `generate`."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and prompt + generate > limit:
        raise ValueError(
            f"The model reads {limit} tokens (`max_position_embeddings`), but the text has {prompt} and {generate} are "
            f"to be generated. Pass a shorter text, or a part of it at a time."
        )
