"""Specialists that read one text one by one, each from where its own part of the cache ends.

What decoding methods for `generate` share that do not run all specialists at every token: some may lag behind, and catch
up in one pass.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.cache_ultrafuser import SpecialistCache
from modeling_ultrafuser.causal_ultrafuser import starts_over, switching_lengths
from modeling_ultrafuser.compat_ultrafuser import CACHE, is_stateful
from modeling_ultrafuser.evidence_ultrafuser import read_evidence
from modeling_ultrafuser.gate_base_ultrafuser import GateOutput, run_before_specialists
from modeling_ultrafuser.inputs_ultrafuser import Tokens, checked_prior
from modeling_ultrafuser.peft_ultrafuser import has_prefix


PLAIN = "Decode without `custom_generate`."


class TextReader:
    """The specialists one by one, each with its part of one cache.

    Args:
        model: A fused model whose specialists are modules of their own.
        model_kwargs: What `generate` passes on to the model: the mask of the prompt, a cache, a prior on the gate.
    """

    def __init__(self, model: UltraFuserForCausalLM, model_kwargs: dict):
        self.model, self.columns = model, model.head_columns()
        self.count, self.gate_prior = len(self.columns), model_kwargs.get("gate_prior")
        self.switches = set().union(*map(switching_lengths, model.config.specialists))
        mask = model_kwargs.get("attention_mask")
        # without padding there is nothing to mask
        self.mask_of_prompt = None if mask is None or mask.all() else mask
        self.cache = model.model.shared_cache(model_kwargs.get(CACHE))
        # or windows would drop what is to be gone back to
        self.cache.activate_past_recording()

    def read(self, k: int, input_ids: Tensor) -> Tensor:
        """Lets specialist k read what it has not read yet. Returns its hidden states there. Shape (batch, new, hidden)."""
        hidden_states = self.model.model.reader.read_rest(
            k, Tokens(input_ids, self.mask(input_ids.shape[1])), self.cache
        )
        # a device map may have put the specialists on several devices
        return hidden_states.to(self.model.lm_head.weight.device)

    def part(self, k: int) -> SpecialistCache:
        """Returns specialist k's part of the cache."""
        return self.model.model.reader.part(k, self.cache)

    def tokens_read(self) -> list[int]:
        """Counts the tokens that each specialist has read."""
        return [self.model.model.reader.tokens_read(k, self.cache) for k in range(self.count)]

    def mask(self, length: int) -> Tensor | None:
        """Returns the mask of the text up to some length, None without padding. Shape (batch, length)."""
        prompt = self.mask_of_prompt
        return None if prompt is None else F.pad(prompt, (0, length - prompt.shape[1]), value=1)

    def weighed(
        self, hidden_states: list[Tensor], input_ids: Tensor, count: int
    ) -> tuple[Tensor, GateOutput, tuple[Tensor, ...]]:
        """Runs the gate at the last `count` tokens, once all specialists have read them.

        Returns:
            The head's input, what the gate returned, and the evidence that it has read, if it does.
        """
        backbone, mask = self.model.model, self.mask(input_ids.shape[1])
        read = Tokens(input_ids[:, -hidden_states[0].shape[1] :], mask)
        evidence = tuple(e[:, -count:] for e in read_evidence(backbone, hidden_states, read, self.cache))
        prior = checked_prior(self.gate_prior, self.model.config.specialist_names, input_ids)
        ahead = run_before_specialists(backbone.fusion_gate, input_ids[:, -count:], **prior)
        states = [h[:, -count:] for h in hidden_states]
        return *backbone.weighed(states, *evidence, gate_output=ahead, **prior), evidence

    def longest(self, length: int) -> int:
        """Counts the tokens of the longest text of the batch, without padding, at a padded length."""
        mask = self.mask(length)
        return length if mask is None else int(mask.sum(-1).max())

    def start_over(self, length: int) -> bool:
        """Forgets everything where keys must be rotated anew (longrope). Returns whether that is so."""
        if not self.switches:
            return False
        over = starts_over(self.switches, max(self.tokens_read()), self.mask(length), self.longest(length))
        if over:
            self.cache.reset()
        return over

    def even_out(self) -> None:
        """Goes back, in the cache, to the last token that all specialists have read."""
        read = self.tokens_read()
        for k, tokens in enumerate(read):
            if tokens > min(read):
                self.part(k).crop(min(read) - tokens)


def processed(logits: Tensor, input_ids: Tensor, count: int, logits_processor: LogitsProcessorList) -> Tensor:
    """Logits after the last tokens, as `generate` is asked to change them, each for the text up to it.

    Shape (batch, count, vocab).
    """
    first = input_ids.shape[1] - count + 1
    scores = [logits_processor(input_ids[:, : first + i], logits[:, i].float()) for i in range(count)]
    return torch.stack(scores, dim=1)


def choose(scores: Tensor, sample: bool) -> Tensor:
    """Draws a token, or takes the best. Shape (batch, 1)."""
    return torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1, keepdim=True)


def end_tokens(config: GenerationConfig) -> list[int]:
    """Lists the tokens that end a text."""
    ends = config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def padding_token(config: GenerationConfig) -> int:
    """Returns the padding token after the end of a text that others outlast, as in `generate`."""
    return next(iter([config.pad_token_id] if config.pad_token_id is not None else end_tokens(config)), 0)


def check_one_by_one(name: str, model: UltraFuserForCausalLM, recurrent: str) -> None:
    """Rejects models whose specialists cannot be run one by one, each on its part of the cache.

    Args:
        name: Of the decoding method, as a sentence begins.
        model: A fused model.
        recurrent: Why recurrent specialists cannot be decoded so: a clause.

    Raises:
        ValueError: With the reason, and the way out.
    """
    if not model.model.reader_class.one_by_one:
        kind = "these are adapters of one base" if model.config.adapters else f"this is a {type(model).__name__}"
        raise ValueError(f"{name} needs specialists that run one by one, but {kind}. {PLAIN}")
    if has_prefix(model):
        raise ValueError(f"{name} reads the text alone, but prefix tuning of PEFT puts a prefix before it. {PLAIN}")
    if is_stateful(model):
        raise ValueError(f"A recurrent specialist {recurrent}. {PLAIN}")


def check_settings(
    name: str, config: GenerationConfig, model_kwargs: dict, more_modes: tuple[GenerationMode, ...] = ()
) -> None:
    """Rejects settings of `generate` that a decoding method cannot follow which reads `input_ids` and returns tokens.

    Args:
        name: Of the decoding method, as a sentence begins.
        config: The settings.
        model_kwargs: What `generate` passes on to the model.
        more_modes: Modes of `generate` that the method stands for, besides greedy search and sampling.

    Raises:
        ValueError: With what was asked for, and the way out.
    """
    if config.num_beams not in (None, 1):
        raise ValueError(f"{name} follows one continuation of a text, but got num_beams={config.num_beams}. {PLAIN}")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, *more_modes):
        raise ValueError(f"{name} decodes greedily or by sampling, but the settings say {mode.value!r}. {PLAIN}")
    cache = model_kwargs.get(CACHE)
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{name} needs a cache that can go back, but got a {type(cache).__name__}. Leave `cache_implementation` out."
        )
    views = [
        key
        for key in ("specialist_input_ids", "specialist_attention_mask", "inputs_embeds", "token_type_ids")
        if model_kwargs.get(key) is not None
    ]
    extra = [f for f in ("scores", "logits", "attentions", "hidden_states") if getattr(config, f"output_{f}")]
    if views or extra:
        raise ValueError(
            f"{name} reads `input_ids` and returns tokens, but got {views + [f'output_{f}' for f in extra]}. {PLAIN}"
        )
