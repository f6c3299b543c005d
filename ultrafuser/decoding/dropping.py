"""Dropping: every few tokens all specialists are asked, and in between those alone to whom the gate listens.

After a prompt, after the first new token, and then at every n-th token, all specialists have read the text. The gate's mean
weights of the last n tokens, of a prompt those of its last one alone, go through a sparsifier (strategies of `SPARSIFIERS`),
and the specialists that it keeps predict the next n - 1 tokens by themselves. The others read nothing meanwhile. At the next
decision they read what they have missed in one pass, which costs little more than one token does, because a pass is bound
by reading the weights: with S of N kept, a token costs S + (N - S) / n passes of one specialist instead of N. Caches are
then exactly those of the plain way; what was said meanwhile is not. (Expert skipping, Lu et al., 2024, arXiv 2402.14800,
leaves out experts of one layer; here it is whole models.)

Greedily, those that are kept draft for each other: up to the next decision, the one that the gate listens to most continues
the text, and the others check its tokens in one pass (see `drafting`). The tokens are the same, in fewer passes than S each.

Before a text ends, everybody is asked: where those that are kept would end it, all read the text at once, and decide. One
that knows only its own domain ends with it, and is sure of it, where another would go on.

In between, the gate shares out all of the weight among those that are kept. Gates that score each specialist by itself
("mlp", "constant", "uniform") make this exactly the fused model without the others. For gates that compare specialists,
the hidden states of those that are out are held at their mean over the last n tokens of all, and evidence of the past at
its last value. So an "anchor" gate whose anchor is out keeps its weights until the next decision.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.compat_ultrafuser import CACHE, forget_last
from modeling_ultrafuser.evidence_ultrafuser import MOST_KEPT, decoding_layer, last_logits
from modeling_ultrafuser.gate_base_ultrafuser import GateOutput, run_before_specialists
from modeling_ultrafuser.peft_ultrafuser import check_head
from modeling_ultrafuser.sparsifier_base_ultrafuser import Sparsifier
from modeling_ultrafuser.sparsifiers_ultrafuser import sparsifier

from . import EVERY, KEEP
from .drafting import drafted_by, verified, with_state
from .reading import TextReader, check_one_by_one, check_settings, choose, end_tokens, padding_token, processed


FIRST_DRAFTS, FEWEST_DRAFTS = 4, 2  # tokens: at first, and after a decision at least


@torch.no_grad()
def drop_specialists(
    model: UltraFuserForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    keep: str = KEEP,
    every: int = EVERY,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decodes greedily or by sampling, with few specialists at most tokens. Not the tokens of the plain way.

    A decoding method for `generate`, which prepares all arguments but the first, `keep` and `every`:

        model.generate(**inputs, custom_generate=drop_specialists, keep="top_p:0.8", every=8)

    With `keep="top_p:1.0"` nobody is left out, and the tokens are those of the plain way. Several texts have one set of kept
    specialists, all that any of them keeps; each has weights of its own.

    Drafts change no greedy token, but in 16 bits two tokens that are almost alike may change places. There are none in sampling,
    so that a seed gives the plain way's text; with a logits processor that may keep a state; and where keys are rotated anew
    once a text is longer (longrope).

    Args:
        keep: A sparsifier for the gate's mean weights, see `SPARSIFIERS`.
        every: Number of tokens from one decision to the next, n; the second decision comes one token after the first. The fewer,
            the sooner a text that changes its domain is followed; the more, the fewer passes.
        streamer: Hears every token. If it has a method `weigh`, that is told the gate's weights of the token first, (batch,
            specialists).
        tokenizer: Unused: `generate` makes criteria for stop strings with it.

    Returns:
        The prompts and their continuations, (batch, seq), or as `return_dict_in_generate` says, with the cache. It holds
        the text as far as all specialists have read it.

    Raises:
        ValueError: If there are beams, or the specialists or the cache cannot lag behind, or a setting is unknown.
    """
    check_droppable(model, keep, every)
    check_settings("Dropping", generation_config, model_kwargs)
    asked = Asked(TextReader(model, model_kwargs), sparsifier(keep), every, end_tokens(generation_config))
    padding, sample = padding_token(generation_config), generation_config.do_sample
    drafting = not sample and not with_state(logits_processor)
    live = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    while live.any():
        most = asked.draftable(generation_config.max_length - input_ids.shape[1]) if drafting else 0
        tokens = asked.drafted(input_ids, live, most, logits_processor, padding) if most > 1 else input_ids[:, :0]
        drafted = bool(tokens.shape[1])
        if not drafted:
            scores = processed(asked.logits(input_ids, live), input_ids, 1, logits_processor)
            tokens = choose(scores[:, 0], sample)
        going, length = live, input_ids.shape[1]
        for column, weights in zip(tokens.T, asked.heard.unbind(1), strict=False):
            column = torch.where(live, column, padding)
            input_ids = torch.cat([input_ids, column[:, None]], dim=-1)
            if hasattr(streamer, "weigh"):
                streamer.weigh(weights)
            if streamer is not None:
                streamer.put(column.cpu())
            live = live & ~stopping_criteria(input_ids, None)
            # where a text ends within drafts, padding is read for it from there on
            if not torch.equal(live, going):
                break
        if drafted:
            asked.take(input_ids.shape[1] - length)
    asked.reader.even_out()
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE: asked.reader.cache})
    return input_ids


class Asked:
    """The specialists that are asked, token by token.

    Args:
        reader: All specialists.
        chooser: From mean weights to those that are kept.
        every: Number of tokens from one decision to the next.
        ends: Tokens that end a text.

    Attributes:
        kept: Which specialists predict by themselves until the next decision. Shape (specialists,).
        read_by_all: Number of tokens that all specialists have read.
        states: Each specialist's hidden states at the last tokens that it has read. Shapes (batch, tokens, hidden).
        weights: The gate's, at the last tokens that all have read. Shape (batch, tokens, specialists).
        heard: The gate's, at the last predictions, those from drafts among them. Shape (batch, tokens, specialists).
        drafts: Number of tokens to draft next: the plain way is 1.
        stand_ins: What the gate reads for specialists that are out. Shapes (batch, 1, hidden).
        evidence: What it reads of the past, up to the last token that all have read.
    """

    def __init__(self, reader: TextReader, chooser: Sparsifier, every: int, ends: Sequence[int] = ()):
        self.reader, self.chooser, self.every = reader, chooser, every
        self.backbone, self.head = reader.model.model, reader.model.lm_head.weight
        self.ends = torch.tensor(ends, dtype=torch.long, device=self.head.device)
        self.kept = torch.ones(reader.count, dtype=torch.bool, device=self.head.device)
        self.since_decision, self.read_by_all = every, reader.tokens_read()[0]
        self.states: list[Tensor | None] = [None] * reader.count
        self.weights: Tensor | None = None
        self.heard: Tensor | None = None
        self.drafts = FIRST_DRAFTS
        self.stand_ins: list[Tensor] = []
        self.evidence: tuple[Tensor, ...] = ()

    def logits(self, input_ids: Tensor, live: Tensor) -> Tensor:
        """Predicts the next token, and decides who is kept where that is due. Shape (batch, 1, vocab).

        Args:
            input_ids: The texts so far. Shape (batch, seq).
            live: Which texts go on. Shape (batch,).
        """
        due, anew = self.since_decision >= self.every, self.reader.start_over(input_ids.shape[1])
        if anew:
            self.read_by_all, self.states = 0, [None] * self.reader.count
        by_all, first = due or anew or self.kept.all(), self.weights is None
        logits = self._by_all(input_ids) if by_all else self._by_kept(input_ids)
        if not by_all and self.would_end(logits)[live].any():
            due, logits = True, self._by_all(input_ids)
        if due:
            self._decide(live)
        # how an answer begins tells more of it than the prompt does: decide again at the next token
        self.since_decision = self.every if first else 1 if due else self.since_decision + 1
        if self.since_decision % EVERY == 0:
            self.drafts = max(self.drafts, FEWEST_DRAFTS)
        return logits

    def draftable(self, room: int) -> int:
        """Returns how many tokens to draft next, never beyond the next decision or `room`: 0 and 1 mean none."""
        if self.heard is None or self.kept.sum() < 2 or self.reader.switches:
            return 0
        return min(self.drafts, self.every - self.since_decision, room, MOST_KEPT)

    def drafted(
        self, input_ids: Tensor, live: Tensor, count: int, logits_processor: LogitsProcessorList, padding: int
    ) -> Tensor:
        """Chooses several tokens greedily: those that would be chosen one by one. Shape (batch, tokens).

        `take` is to be told how many of them are taken. They are none where those that are kept would end a text at once:
        `logits` then asks everybody.

        Args:
            input_ids: The texts so far. Shape (batch, seq).
            live: Which texts go on. Shape (batch,).
            count: How many to draft, not beyond the next decision.
            logits_processor: One that keeps no state.
            padding: Token after the end of a text.
        """
        by_all, leader = bool(self.kept.all()), int(self.heard[live, -1].mean(0).where(self.kept, -1).argmax())
        drafted, _, hidden = drafted_by(self.reader, leader, input_ids, count, logits_processor, False, live, padding)
        self.states[leader] = _appended(self.states[leader], hidden)
        drafts, block = drafted[:, input_ids.shape[1] :], drafted[:, :-1]
        logits = self._by_all(block, count) if by_all else self._by_kept(block, count)
        going_on = count if by_all else int((~self.would_end(logits)[live].any(0)).cumprod(0).sum())
        tokens, accepted = verified(drafts, None, processed(logits, block, count, logits_processor), False, live)
        # where none of two is taken, nothing is drafted until the next decision
        self.drafts = max(self.drafts, 2 * count) if accepted == count else (count + accepted + 1) // 2
        if going_on < tokens.shape[1]:
            # so that `logits` asks everybody
            self.drafts, tokens = 1, tokens[:, :going_on]
        if not going_on:
            self.take(0)
        return tokens

    def take(self, count: int) -> None:
        """Takes the first tokens of what was drafted, and forgets what was read of the others."""
        beyond = self.heard.shape[1] - count
        kept = self.kept.nonzero()[:, 0].tolist()
        if self.kept.all():
            self.reader.cache.crop(-beyond)
            self.read_by_all -= beyond
            self.weights, *self.evidence = (t[:, : t.shape[1] - beyond] for t in (self.weights, *self.evidence))
        else:
            # windows are not restricted yet: at the end they may have to go back to the last decision
            for k in kept:
                forget_last(self.reader.part(k), beyond)
        for k in kept:
            self.states[k] = self.states[k][:, : self.states[k].shape[1] - beyond]
        self.heard = self.heard[:, : max(count, 1)]
        self.since_decision += count

    def _by_all(self, input_ids: Tensor, count: int = 1) -> Tensor:
        """Lets those that lag behind catch up, and predicts as the plain way does, after each of the last tokens."""
        reader, new = self.reader, input_ids.shape[1] - self.read_by_all
        self._read(input_ids, range(reader.count))
        if count == 1:
            # windows need not go back further
            reader.cache.crop(0)
        states = [s[:, -new:] for s in self.states]
        fused, output, self.evidence = reader.weighed(states, input_ids, min(self.every, new))
        self.read_by_all = input_ids.shape[1]
        # of a prompt, only the last token's: a gate is not trained on the others
        weights = output.weights[:, -1:] if self.weights is None else output.weights
        self.weights = _appended(self.weights, weights)
        output = GateOutput(*(None if t is None else t[:, -count:] for t in output))
        self.heard = output.weights
        return self.predicted_by_all(fused[:, -count:], output)

    def predicted_by_all(self, fused: Tensor, output: GateOutput) -> Tensor:
        """Predicts from the head's input and what the gate returned at the last tokens."""
        layer = decoding_layer(self.backbone, self.reader.cache, fused.shape[1])
        if layer is not None:
            return last_logits(self.backbone.fusion_rule, self.head, layer, *output)
        return self.reader.model.logits(fused, output.weights)

    def _by_kept(self, input_ids: Tensor, count: int = 1) -> Tensor:
        """Predicts without those that are out, which read nothing, after each of the last tokens."""
        kept, gate = self.kept.nonzero()[:, 0].tolist(), self.backbone.fusion_gate
        self._read(input_ids, kept)
        states = [
            self.states[k][:, -count:] if k in kept else s.expand(-1, count, -1) for k, s in enumerate(self.stand_ins)
        ]
        prior = self._prior(input_ids.shape[0])
        output = run_before_specialists(gate, input_ids[:, -count:], prior=prior)
        if output is None:
            held = (e[:, -1:].expand(-1, count, *e.shape[2:]) for e in self.evidence)
            output = gate(states, *held, prior=prior)
        self.heard = output.weights
        return self.predicted_by_kept({k: states[k] for k in kept}, output)

    def predicted_by_kept(self, states: dict[int, Tensor], output: GateOutput) -> Tensor:
        """Predicts from the hidden states of those that are kept, by index, and what the gate returned."""
        weights, scales = (None if t is None else t.to(self.head.device) for t in output)
        logits = [F.linear(own.to(self.head.dtype), self.head[:, self.reader.columns[k]]) for k, own in states.items()]
        return self.backbone.fusion_rule.fused(logits, weights, scales, list(states)).to(logits[0].dtype)

    def would_end(self, logits: Tensor) -> Tensor:
        """Tells which predictions would end a text. Shape (batch, tokens), of logits (batch, tokens, vocab)."""
        return torch.isin(logits.argmax(-1), self.ends)

    def _prior(self, texts: int) -> Tensor:
        """Shares out all weight among those that are kept, by the prior on the gate if there is one."""
        kept, given = self.kept.expand(texts, -1).float(), self.reader.gate_prior
        prior = kept if given is None else kept * given
        # of a text that has ended it may want others
        return torch.where(prior.sum(-1, keepdim=True) > 0, prior, kept)

    def _read(self, input_ids: Tensor, specialists: Iterable[int]) -> None:
        """Lets specialists read what they have not read yet."""
        read = self.reader.tokens_read()
        for k in specialists:
            if read[k] < input_ids.shape[1]:
                self.states[k] = _appended(self.states[k], self.reader.read(k, input_ids))

    def _decide(self, live: Tensor) -> None:
        """Keeps what the mean weights of any text that goes on keep. All specialists have read the text."""
        self.weights, *self.states = (t[:, -self.every :] for t in (self.weights, *self.states))
        self.kept = self.chooser.chosen(self._mean(self.weights)[:, 0])[live].any(0)
        self.stand_ins = [self._mean(s) for s in self.states]
        self.drafts = max(self.drafts, FEWEST_DRAFTS)

    def _mean(self, values: Tensor) -> Tensor:
        """Averages over the last tokens, without padding. Shape (batch, 1, size), of (batch, tokens, size)."""
        mask = self.reader.mask(self.read_by_all)
        if mask is None:
            return values.mean(1, keepdim=True)
        real = mask[:, -values.shape[1] :, None].to(values)
        return (values * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


def _appended(earlier: Tensor | None, new: Tensor) -> Tensor:
    return new if earlier is None else torch.cat([earlier, new], dim=1)


def check_droppable(model: UltraFuserForCausalLM, keep: str = KEEP, every: int = EVERY) -> None:
    """Rejects a model whose specialists cannot lag behind, and unknown settings. See `drop_specialists`.

    Raises:
        ValueError: With the reason, and the way out.
    """
    if model.config.adapters:
        raise ValueError(
            f"{model.config.specialist_names} are adapters of one base, which reads a token once for all of them. Leaving "
            f"some out saves little. Decode without dropping."
        )
    if model.config.signed_weights is not None:
        raise ValueError(
            f"Dropping keeps the specialists with the largest shares, but `signed_weights` are "
            f"{model.config.signed_weights}. Decode without dropping."
        )
    if model.model.fusion_rule.needs_all:
        raise ValueError(
            f"Dropping leaves out specialists without much weight, but fusion={model.config.fusion!r} compares all of them. "
            f"Decode without dropping."
        )
    # Mamba, Mamba 2 and Bamba begin such a block from an empty state, without a word
    recurrent = "cannot catch up: several families read a block of tokens as if nothing were before it"
    check_one_by_one("Dropping", model, recurrent)
    check_head(model.lm_head, "Dropping")
    sparsifier(keep)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(
            f"`every` is the number of tokens from one decision to the next, at least 1, but it is {every!r:.100}. "
            f"{EVERY} is the default."
        )
