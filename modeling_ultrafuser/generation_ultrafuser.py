"""Generation with a fused model: views of the prompt, drafts, prepared masks, continuous batching."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .causal_ultrafuser import causal_class, starts_over, switching_lengths, tokens_before_switch
from .compat_ultrafuser import CACHE, GenerationHooks, is_stateful, takes_cache
from .inputs_ultrafuser import positions_of
from .peft_ultrafuser import has_prefix
from .probing_ultrafuser import check_pages
from .serving_ultrafuser import check_answered, check_pageable


class FusedGeneration(GenerationHooks):
    """Mixin of the causal language model, before `GenerationMixin`: what generation asks of many specialists."""

    @property
    def goes_back(self) -> bool:
        """Returns whether the cache can go back to before a rejected draft, which recurrent states cannot."""
        return not any(is_stateful(causal_class(config)) for config in self.config.backbones)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
        """Like the library's, and lets each specialist read the prompt in its own words.

        Generated tokens are the same for all: they are appended to every view, and to its mask. Where a specialist's keys
        are to be rotated by other factors from here on, the text is read anew.

        Raises:
            ValueError: If it would have to be, and its beginning is not in `input_ids`.
        """
        own_ids, own_mask = kwargs.pop("specialist_input_ids", None), kwargs.pop("specialist_attention_mask", None)
        mask = kwargs.get("attention_mask")
        if own_ids is not None:
            generated = input_ids[:, None, own_ids.shape[-1] :].expand(-1, own_ids.shape[1], -1)
            own_mask = torch.ones_like(own_ids) if own_mask is None else own_mask
            own_mask = torch.cat([own_mask, torch.ones_like(generated)], dim=-1)
            # a chunk of a long prompt ends before the prompt does
            ahead = 0 if mask is None else own_mask.shape[-1] - mask.shape[-1]
            own_mask = own_mask[..., : own_mask.shape[-1] - ahead]
        cache = kwargs.get(CACHE)
        if cache is not None and self._starts_over(cache, input_ids, own_mask, mask, kwargs.get("position_ids")):
            cache.reset()
            kwargs["next_sequence_length"] = None
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if own_ids is not None:
            inputs["specialist_attention_mask"] = own_mask
            to_read = inputs["input_ids"].shape[-1]
            if to_read > generated.shape[-1]:  # a part of the prompt is not in the cache yet
                own_ids = torch.cat([own_ids, generated], dim=-1)
                end = own_ids.shape[-1] - ahead
                inputs["specialist_input_ids"] = own_ids[..., end - to_read : end]
        return inputs

    def _starts_over(
        self, cache: Cache, input_ids: Tensor, own_mask: Tensor | None, mask: Tensor | None, positions: Tensor | None
    ) -> bool:
        """Returns whether the cache must be recomputed for any specialist."""
        for k, config in enumerate(self.config.specialists):
            lengths = switching_lengths(config)
            if not lengths:
                continue
            if own_mask is not None:
                mask, positions = own_mask[:, k], None
            if positions is None:
                positions = positions_of(torch.ones_like(input_ids) if mask is None else mask, input_ids.shape[1])
            length = int(positions.max()) + 1
            if not starts_over(lengths, cache.get_seq_length(), mask, length):
                continue
            whole = length if mask is None else mask.shape[1]
            if input_ids.shape[1] == whole:
                return True
            raise ValueError(
                f"Keys of {self.config.specialist_names[k]!r} are rotated by other factors once a text is longer than "
                f"{sorted(lengths)} tokens, so its beginning must be read anew there, but got the last "
                f"{input_ids.shape[1]} of {whole} tokens alone. Pass the whole text as `input_ids`, and no "
                f"`prefill_chunk_size`."
            )
        return False

    def generate(self, *args, streamer=None, **kwargs):
        """Like the library's; and a streamer hears the end also where generating fails, so that nobody waits for ever."""
        try:
            return super().generate(*args, **kwargs, **({} if streamer is None else {"streamer": streamer}))
        except BaseException:
            if streamer is not None:
                streamer.end()
            raise

    def arguments_of_drafts(self, model_kwargs: dict) -> dict:
        """Returns the ordinary input: a draft model of any kind reads that."""
        ours = {"specialist_input_ids", "specialist_attention_mask", "gate_prior"}
        return {key: value for key, value in model_kwargs.items() if key not in ours}

    def shorten_drafts(self, generator, model_kwargs: dict) -> None:
        """Ends drafts where a specialist's factors of rotation change."""
        lengths = set().union(*map(switching_lengths, self.config.specialists))
        if lengths:
            mask, draft = model_kwargs.get("attention_mask"), generator.get_candidates
            padding = 0 if mask is None else int((mask == 0).sum())

            def get_candidates(input_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
                """Up to where factors of rotation change: one pass over the drafts has one set of them."""
                candidates, logits = draft(input_ids, *args, **kwargs)
                room = tokens_before_switch(lengths, input_ids.shape[1] - padding)
                if room is None or candidates.shape[1] - input_ids.shape[1] <= room:
                    return candidates, logits
                kept = logits[:, :room] if room and logits is not None else None
                return candidates[:, : input_ids.shape[1] + room], kept

            generator.get_candidates = get_candidates

    def init_continuous_batching(self, *args, **kwargs):
        """Like the library's, and refuses what one paged cache cannot hold before anything starts.

        Raises:
            ValueError: If the specialists' attention geometry differs, or one does not use the paged cache.
        """
        self.model.reader_class.check_engine(self.config, "Continuous batching")
        check_pageable(self.config)
        check_pages(self.config, self.model.specialists)
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs) -> dict:
        """Like the library's, which leaves out or cuts short in silence what went wrong.

        Raises:
            RuntimeError: If a prompt has no whole answer, with the reason.
            ValueError: If texts have a prior.
        """
        if kwargs.get("gate_prior") is not None:
            raise ValueError(
                "Continuous batching makes one batch of all texts, in an order of its own, but got `gate_prior`, a row for each "
                "text. Leave it out, or use `generate`."
            )
        answers = super().generate_batch(inputs, *args, **kwargs)
        check_answered(len(inputs), answers)
        return answers

    @takes_cache
    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **kwargs) -> dict:
        """Attention masks for static caches, made in advance for every specialist, as one flat dict.

        Keys are the specialist's name, or "name/layer_type" where its layers need several masks. Adapters of one base
        need no more than it does.

        Raises:
            ValueError: If PEFT prepares inputs with a prefix of its own, which takes one mask.
        """
        if has_prefix(self):
            raise ValueError(
                "Prefix tuning of PEFT makes one attention mask longer, but with a static cache there is one for every "
                "specialist. Leave `cache_implementation='static'` out."
            )
        return self.model.reader.masks(inputs_embeds, attention_mask, past_key_values, **kwargs)
