"""Self-drafting: the specialist that the gate listens to most drafts a few tokens, the others check them in one pass.

Speculative sampling (Leviathan et al., 2023, arXiv 2211.17192, algorithm 1) with a drafter that is part of the model it
drafts for. Its hidden states at the drafted positions are those that the fused model needs, so checking runs the other
specialists only, and the key-value cache is the fused model's own. A round of n drafts costs n + N - 1 passes of one
specialist and yields up to n tokens, where the plain way costs N passes a token. Where a text repeats itself, what came
next before is the draft (prompt lookup), for N passes in all and up to n + 1 tokens. It pays where a pass is bound by
reading the weights: several tokens at once cost such a pass little more than one.
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode, logits_process

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.causal_ultrafuser import switching_lengths, tokens_before_switch
from modeling_ultrafuser.compat_ultrafuser import CACHE
from modeling_ultrafuser.evidence_ultrafuser import MOST_KEPT
from modeling_ultrafuser.families_ultrafuser import bounded, soft_cap
from modeling_ultrafuser.gate_base_ultrafuser import Reads

from .reading import PLAIN, TextReader, check_one_by_one, check_settings, choose, padding_token, processed


# of the library's, those that only look at the text so far, so that what was drafted leaves no trace in them
STATELESS = {
    *("MinLength", "MinNewTokensLength", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram"),
    *("EncoderNoRepeatNGram", "SequenceBias", "NoBadWords", "ForcedBOSToken", "ForcedEOSToken", "InfNanRemove"),
    *("ExponentialDecayLengthPenalty", "LogitNormalization", "SuppressTokensAtBegin", "SuppressTokens"),
    *("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta"),
}
REPEATED, GUESSES = 3, 8  # tokens that stood there before, and how many of those that followed are guessed to follow


@torch.no_grad()
def self_draft(
    model: UltraFuserForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_drafts: int = 6,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decodes greedily or by sampling, from the very distribution of the plain way.

    A decoding method for `generate`, which prepares all arguments but the first and `num_drafts`:

        model.generate(**inputs, custom_generate=self_draft, num_drafts=6)

    Greedy tokens are those of the plain way; in 16 bits two tokens that are almost alike may change places, because a
    block is summed in another order than its tokens one by one. Several texts keep one length: one specialist drafts for
    all of them, and a round ends where the first of them rejects. Whether it does is settled by what comes before, so
    that each text is still drawn from its own distribution; but the more texts, the shorter the rounds.

    Args:
        num_drafts: How many tokens to draft in the first round. Two more after a round that was accepted as a whole;
            after any other the mean of what was drafted and what was accepted, at least 2. The drafter is chosen anew
            for each round.
        streamer: Hears every token once it is certain.
        tokenizer: Unused: `generate` makes criteria for stop strings with it.

    Returns:
        The prompts and their continuations, (batch, seq), or as `return_dict_in_generate` says, with the cache.

    Raises:
        ValueError: If there are beams, or the specialists or the cache cannot go back to before a draft, or something
            else is asked for that drafts would change.
    """
    _check(model, generation_config, num_drafts, model_kwargs)
    _check_processors(logits_processor)
    reader = TextReader(model, model_kwargs)
    sample, padding = generation_config.do_sample, padding_token(generation_config)

    # the prompt, by all: the first token, and who is heard most
    hidden_states = [reader.read(k, input_ids) for k in range(reader.count)]
    fused, (gate_weights, _), _ = reader.weighed(hidden_states, input_ids, 1)
    scores = processed(model.logits(fused, gate_weights), input_ids, 1, logits_processor)
    input_ids = torch.cat([input_ids, choose(scores[:, 0], sample)], dim=-1)
    live = ~stopping_criteria(input_ids, None)
    if streamer is not None:
        streamer.put(input_ids[:, -1].cpu())

    while live.any():
        length = input_ids.shape[1]
        room = min(generation_config.max_length - length, _room(reader, length))
        drafts = _said_before(input_ids, min(GUESSES, room - 1))
        if drafts.shape[1]:
            # all read all of it, so that a token comes with it
            block, own = torch.cat([input_ids, drafts], dim=-1), {}
            proposed = F.one_hot(drafts, model.config.vocab_size).log()
        else:
            favourite = int(gate_weights[live, -1].mean(0).argmax())
            drafted, proposed, hidden = drafted_by(
                reader, favourite, input_ids, min(num_drafts, room, MOST_KEPT), logits_processor, sample
            )
            # nobody reads the last draft before it is accepted
            drafts, block, own = drafted[:, length:], drafted[:, :-1], {favourite: hidden}
        count = block.shape[1] - length + 1
        hidden_states = [own[k] if k in own else reader.read(k, block) for k in range(reader.count)]
        fused, (gate_weights, _), _ = reader.weighed(hidden_states, block, count)
        target = processed(model.logits(fused, gate_weights), block, count, logits_processor)
        tokens, accepted = verified(drafts, proposed, target, sample, live)
        if own:
            num_drafts = count + 2 if accepted == count else max(2, (count + accepted + 1) // 2)

        for column in tokens.T:  # a text may end within the block
            column = torch.where(live, column, padding)
            input_ids = torch.cat([input_ids, column[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(column.cpu())
            live = live & ~stopping_criteria(input_ids, None)
            if not live.any():
                break
        gate_weights = gate_weights[:, : input_ids.shape[1] - length]
        # what was rejected is forgotten
        reader.cache.crop(input_ids.shape[1] - 1 - block.shape[1])

    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE: reader.cache})
    return input_ids


def verified(
    drafts: Tensor, proposed: Tensor | None, target: Tensor, sample: bool, live: Tensor | None = None
) -> tuple[Tensor, int]:
    """The drafts up to the first that any text rejects, and there what stands in its place.

    A draft x is accepted with probability min(1, p(x) / q(x)); in place of a rejected one comes a token drawn from
    max(p - q, 0), normalised. What comes out is then distributed as p (algorithm 1). Greedily, p is a single token.

    Args:
        drafts: The drafted tokens. Shape (batch, drafts).
        proposed: Scores that they were drawn from, q, unread unless drawn. Shape (batch, drafts, vocab).
        target: The fused model's scores at the same positions, p, and maybe at the next one, where a token is drawn if
            all drafts are accepted. Shape (batch, drafts or one more, vocab).
        sample: Whether to draw, or to take the best.
        live: Which texts go on; the others accept everything. Shape (batch,).

    Returns:
        At least one token of each text, (batch, tokens), and how many drafts all of them accepted.
    """
    number = drafts.shape[1]
    if sample:
        p, q = target[:, :number].softmax(-1), proposed.softmax(-1)
        ratios = (p.gather(-1, drafts[..., None]) / q.gather(-1, drafts[..., None])).squeeze(-1)
        accepts = torch.rand_like(ratios) < ratios
    else:
        accepts = target[:, :number].argmax(-1) == drafts
    if live is not None:
        accepts = accepts | ~live[:, None]
    accepted = int(accepts.all(0).cumprod(0).sum())
    if accepted == number:
        more = [choose(target[:, number], sample)] if target.shape[1] > number else []
        return torch.cat([drafts, *more], dim=-1), accepted
    # the first column that some text rejects is the last one kept
    tokens, rejects = drafts[:, : accepted + 1].clone(), ~accepts[:, accepted]
    end = target[rejects, accepted]
    if sample:
        p, q = p[rejects, accepted], q[rejects, accepted]
        rest = (p - q).clamp(min=0)
        # of two distributions that differ by rounding alone nothing may be left
        end = torch.where(rest.any(-1, keepdim=True), rest, p).log()
    tokens[rejects, -1] = choose(end, sample)[:, 0]
    return tokens, accepted


def _said_before(input_ids: Tensor, count: int) -> Tensor:
    """Returns up to `count` tokens that followed the same last tokens earlier in the text. Shape (1, tokens).

    Several texts would have to repeat themselves at the same time: for them it is nothing.
    """
    batch, length = input_ids.shape
    nothing = input_ids[:, :0]
    if batch > 1 or length <= REPEATED or count < 1:
        return nothing
    places = (input_ids[0, :-1].unfold(0, REPEATED, 1) == input_ids[0, -REPEATED:]).all(-1).nonzero()
    if not len(places):
        return nothing
    start = int(places[-1]) + REPEATED
    return input_ids[:, start : start + count]


def drafted_by(
    reader: TextReader,
    k: int,
    input_ids: Tensor,
    count: int,
    logits_processor: LogitsProcessorList,
    sample: bool,
    live: Tensor | None = None,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lets specialist k continue the texts by itself; those that have ended, if `live` says so, with padding.

    Returns:
        The texts with the drafts, (batch, seq + drafts), the scores that they were drawn from,
        (batch, drafts, vocab), and the hidden states that those were read off, (batch, drafts, hidden).
    """
    head, cap = reader.model.lm_head.weight[:, reader.columns[k]], soft_cap(reader.model.config.specialists[k])
    scores, hidden_states = [], []
    for _ in range(count):
        hidden = reader.read(k, input_ids)[:, -1:]
        own = processed(bounded(F.linear(hidden, head), cap), input_ids, 1, logits_processor)
        token = choose(own[:, 0], sample)
        token = token if live is None else torch.where(live[:, None], token, padding)
        input_ids = torch.cat([input_ids, token], dim=-1)
        scores.append(own)
        hidden_states.append(hidden)
    return input_ids, torch.cat(scores, dim=1), torch.cat(hidden_states, dim=1)


def _room(reader: TextReader, length: int) -> int:
    """Returns how many tokens the text can grow by until keys must be rotated anew, which is done where it is due.

    One pass over drafts has one set of factors of rotation (longrope), which change with the length of the text.
    """
    reader.start_over(length)
    room = tokens_before_switch(reader.switches, reader.longest(length))
    return sys.maxsize if room is None else room + 1


def _check(model, config: GenerationConfig, num_drafts: int, model_kwargs: dict) -> None:
    check_one_by_one("Self-drafting", model, recurrent="cannot go back to before a rejected draft")
    check_settings("Self-drafting", config, model_kwargs, (GenerationMode.ASSISTED_GENERATION,))
    if not isinstance(num_drafts, int) or num_drafts < 1:
        raise ValueError(f"`num_drafts` counts tokens drafted in a round, at least 1, but it is {num_drafts!r}.")
    if Reads.PAST in model.model.fusion_gate.reads and any(map(switching_lengths, model.config.specialists)):
        raise ValueError(
            f"Keys of a specialist are rotated by other factors once the text is longer (longrope), so that it is read anew, "
            f"which a drafter does alone, but gate={model.config.gate!r} reads what all say of all of it. {PLAIN}"
        )


def _check_processors(logits_processor: LogitsProcessorList) -> None:
    if others := with_state(logits_processor):
        raise ValueError(
            f"Scores of drafts pass through the logits processors, too, and what is rejected must leave no trace in them, "
            f"but {others} may keep a state (guidance, watermarks, functions of your own). Decode without "
            f"`custom_generate`."
        )


def with_state(logits_processor: LogitsProcessorList) -> list[str]:
    """Names those that may remember what they were called for."""
    return [
        type(p).__name__
        for p in logits_processor
        if type(p).__module__ != logits_process.__name__
        or type(p).__name__.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") not in STATELESS
    ]
