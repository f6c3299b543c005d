"""The fused model: several specialist backbones, a gate, and one wide head.

With last hidden states h_k, heads W_k and gate weights w_k, the paper's fused logits (Ding et al., 2024, Eq. 1) are

    sum_k w_k (h_k W_k^T)  =  [w_1 h_1, ..., w_N h_N] [W_1, ..., W_N]^T

so that a fused model is an ordinary causal language model: `UltraFuserModel` returns the gate-scaled hidden states
side by side, and `lm_head` holds the specialists' heads side by side.
"""

import copy
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .adapters_ultrafuser import add_adapters, merged_backbone, run_as_rows
from .cache_ultrafuser import SpecialistCache
from .carrying_ultrafuser import Carrier, find_head
from .causal_ultrafuser import (
    causal_class,
    masks_for_generate,
    starts_over,
    switching_lengths,
    tokens_before_switch,
)
from .checkpoint_ultrafuser import check_fused
from .configuration_ultrafuser import UltraFuserConfig, attention_of_all
from .embeddings_ultrafuser import TokenEmbeddings
from .evidence_ultrafuser import decoding_layer, last_logits, layer_of, read_evidence
from .files_ultrafuser import HUB_OPTIONS, in_words
from .fusing_ultrafuser import fuse_specialists
from .fusions_ultrafuser import FUSIONS, one_head_rules
from .gate_base_ultrafuser import Gate, GateOutput
from .gates_ultrafuser import GATES
from .head_ultrafuser import head_columns
from .outputs_ultrafuser import UltraFuserCausalLMOutput, UltraFuserMixtureOutput, UltraFuserModelOutput
from .peft_ultrafuser import check_adapters, check_head, has_prefix
from .probing_ultrafuser import check_pages
from .serving_ultrafuser import check_answered, check_pageable, check_servable_by_vllm, refuse_cache_of_one_shape
from .specialists_ultrafuser import (
    BASE,
    Specialists,
    check_checkpointed,
    check_inputs,
    end_to_end,
    is_plain,
    positions_of,
    refuse_other_specialists,
    refuse_quantised_head,
    refuse_router_loss,
    run_each,
    selected,
)
from .versions_ultrafuser import CACHE, takes_cache


# a path that no fused model has
PROMPT_TUNING_ASKS_FOR = "embeddings.word_embeddings"


class UltraFuserPreTrainedModel(PreTrainedModel):
    """What the backbone and the causal language model have in common."""

    config_class = UltraFuserConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = [CACHE]
    _keep_in_fp32_modules_strict = ["fusion_gate"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that loading fills whatever a saved folder does not hold as it does for the library's own models.

        In other people's code it passes over modules without tensors of their own, backbones among them: the buffers
        that Falcon-H1 fills there, for one, would be left as whatever was in memory.
        """
        return False

    @classmethod
    def get_init_context(cls, *args, **kwargs) -> list:
        """Like the library's, without drawing numbers for tensors that are loaded right after."""
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gate):
            module.init_weights()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Like the library's, and refuses a folder that is damaged, or that is not what its own config.json says.

        Raises:
            ValueError: Naming the file or the tensor, before anything large is allocated.
        """
        source = pretrained_model_name_or_path
        if source is not None and not kwargs.keys() & {"gguf_file", "variant"}:
            hub = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
            check_fused(super().from_pretrained, cls, source, **hub)
        if torch.get_default_device().type == "meta":
            # the caller's mistake and no file's, which the library tells
            return super().from_pretrained(source, *args, **kwargs)
        with in_words("The fused model", source or "in memory", kwargs):
            return super().from_pretrained(source, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # the library's last step before it reports, with a table of shapes or a mere warning
        super()._adjust_missing_and_unexpected_keys(loading_info)
        names, parts = self.config.specialist_names, list(self.base_model.specialists)
        refuse_other_specialists(names, parts, [n for n, _ in self.named_parameters()], loading_info)
        refuse_quantised_head(getattr(self, "lm_head", None))

    def post_init(self) -> None:
        """Like the library's, and remembers the words of which the paths of its own parameters are made."""
        super().post_init()
        self.path_parts = frozenset(part for name, _ in self.named_parameters() for part in name.split("."))

    def named_modules(self, *args, **kwargs) -> Iterator:
        """Like torch's. Whoever puts on, trains or saves adapters begins here, so that here they are checked."""
        check_adapters(self)
        return super().named_modules(*args, **kwargs)

    def set_attn_implementation(self, *args, **kwargs) -> None:
        """Like the library's; and the configuration tells what specialists run by, not what was asked of them."""
        try:
            super().set_attn_implementation(*args, **kwargs)
        finally:
            self.base_model._tell_attention()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resizes the embeddings of every specialist, and the head. Returns what `get_input_embeddings` does."""
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        for specialist in self.base_model.specialists.values():
            specialist.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = self.get_input_embeddings().weight.shape[0]
        head = self.get_output_embeddings()
        if isinstance(head, nn.Linear):
            trainable = head.weight.requires_grad
            self.set_output_embeddings(self._get_resized_lm_head(head, rows, mean_resizing=mean_resizing))
            self.get_output_embeddings().requires_grad_(trainable)
        self.base_model.resized |= rows != self.config.vocab_size
        self.config.vocab_size = self.vocab_size = self.base_model.vocab_size = rows
        return self.get_input_embeddings()


class UltraFuserModel(UltraFuserPreTrainedModel):
    """The specialists' backbones and the gate.

    Building it loads nothing: weights come from `from_pretrained`, or from `UltraFuserForCausalLM.from_specialists`.
    """

    def __init__(self, config: UltraFuserConfig):
        super().__init__(config)
        if not config.specialists:
            raise ValueError(
                "A fused model needs specialists, but the configuration names none. Build one with "
                "`UltraFuserForCausalLM.from_specialists({'text': ..., 'code': ...})`."
            )
        refuse_router_loss(None, config)
        # vLLM looks a layer's attention up by its number among all layers; transformers counts each specialist's own
        number_globally = config._attn_implementation == "vllm"
        if number_globally:
            check_servable_by_vllm(config)
        names = config.specialist_names if config.adapters is None else [BASE]
        pairs = zip(names, config.backbones, strict=True)
        self.specialists = Specialists({name: AutoModel.from_config(c) for name, c in pairs})
        if config.adapters is not None:
            add_adapters(self.specialists[BASE], config)
        self.first_layers = [0]
        for c in config.backbones:
            self.first_layers.append(self.first_layers[-1] + c.num_hidden_layers)
        if number_globally:
            for start, specialist in zip(self.first_layers, self.specialists.values(), strict=False):
                for module in specialist.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx += start
        self.fusion_gate = GATES[config.gate](config)
        self.fusion_rule = FUSIONS[config.fusion](config)
        # whoever has a head puts it here, for gates that read the past; in a tuple, so that it is no part of the backbone
        self.wide_head: tuple[nn.Module, ...] = ()
        self.carrier: Carrier | None = None
        if number_globally and self.fusion_gate.reads_past:
            self.carrier = Carrier(config, self.fusion_gate.evidence)
            find_head(self)
        self.resized = False
        self._tell_attention()
        self.post_init()

    def _tell_attention(self) -> None:
        """Writes into the configuration how specialists attend: as all do, or else as all can."""
        chosen = attention_of_all(self.config)
        own = {name: c._attn_implementation for name, c in zip(*self.config._names_and_configs(), strict=True)}
        # for each, or the setter would change theirs, too
        self.config._attn_implementation = own | {"": chosen or "eager"}

    def get_input_embeddings(self) -> nn.Module:
        """Every specialist's, as one module. Adapters of one base have a single one."""
        embeddings = {name: s.get_input_embeddings() for name, s in self.specialists.items()}
        return TokenEmbeddings(embeddings) if self.config.adapters is None else embeddings[BASE]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets every specialist's, from what `get_input_embeddings` returns or anything else with theirs by name.

        Raises:
            ValueError: If that is one embedding, for several specialists.
        """
        if self.config.adapters is not None:
            self.specialists[BASE].set_input_embeddings(value)
            return
        names = list(self.specialists)
        if not isinstance(value, nn.ModuleDict) or set(value) != set(names):
            raise ValueError(
                f"Each specialist has a token embedding of its own, so that setting them takes one for each of {names}, "
                f"but got {type(value).__name__}. Pass `nn.ModuleDict` of them by name, or set one alone: "
                f"`model.model.specialists[name].set_input_embeddings(...)`."
            )
        for name in names:
            self.specialists[name].set_input_embeddings(value[name])

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        specialist_input_ids: Tensor | None = None,
        specialist_attention_mask: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UltraFuserModelOutput | UltraFuserMixtureOutput | tuple:
        """Runs every specialist and weighs their last hidden states.

        Args:
            input_ids: Token ids, the same for every specialist. Shape (batch, seq).
            attention_mask: 1 for tokens, 0 for padding. Shape (batch, past + seq). Prepared masks are taken too.
            position_ids: Positions of the tokens. Shape (batch, seq).
            past_key_values: One cache for all specialists.
            inputs_embeds: Refused: specialists embed the same token differently. vLLM asks for the argument.
            use_cache: Whether to return a cache. Default: no in training, else as the configuration says.
            specialist_input_ids: The prompt in each specialist's own words, padded on the left to one length.
                Shape (batch, specialists, seq).
            specialist_attention_mask: Its mask. Shape (batch, specialists, past + seq).
            output_hidden_states: Whether to return every layer's hidden states, or positions of those to return
                among all of them: the others are then None.
            output_attentions: Whether to return attention weights.
            return_dict: Whether to return a named output instead of a tuple.
            **kwargs: Passed on to every specialist untouched.

        Raises:
            ValueError: If `inputs_embeds` is given, or `input_ids` is not, or a per-specialist input has a wrong shape.
        """
        check_inputs(
            self.config.specialist_names, input_ids, inputs_embeds, specialist_input_ids, specialist_attention_mask
        )
        refuse_router_loss(kwargs.pop("output_router_logits", None), self.config, *self.config.backbones)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache or past_key_values is not None:
            past_key_values = self._shared_cache(past_key_values)
            if self.training and self.is_gradient_checkpointing:
                check_checkpointed(past_key_values)
        for key, wanted in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
            if getattr(self.config, key) if wanted is None else wanted:
                kwargs[key] = True
        inputs = (input_ids, attention_mask, position_ids, past_key_values)
        kwargs |= {
            "specialist_input_ids": specialist_input_ids,
            "specialist_attention_mask": specialist_attention_mask,
        }
        if self.config.adapters is None:
            outputs = run_each(self.specialists, self.first_layers, *inputs, use_cache=use_cache, **kwargs)
        else:
            number = len(self.config.specialists)
            outputs = run_as_rows(self.specialists[BASE], number, *inputs, use_cache=use_cache, **kwargs)

        # a device map may have put the specialists on several devices
        device = outputs[-1].last_hidden_state.device
        states = [o.last_hidden_state.to(device) for o in outputs]
        views = (specialist_input_ids, specialist_attention_mask, kwargs.get("cu_seq_lens_q"))
        if self.carrier is None:
            evidence = read_evidence(self, states, input_ids, past_key_values, attention_mask, position_ids, *views)
        else:
            evidence = (self.carrier(states, input_ids, position_ids, self.wide_head[0].weight),)
        fused, gate_output = self.weighed(states, *evidence)
        output = self.fusion_rule.output_class(
            fused,
            **{CACHE: past_key_values},
            hidden_states=selected(end_to_end(outputs, "hidden_states", fused), output_hidden_states),
            attentions=end_to_end(outputs, "attentions"),
            gate_weights=gate_output.weights,
            logit_scales=gate_output.scales,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def weighed(self, hidden_states: list[Tensor], *evidence: Tensor) -> tuple[Tensor, GateOutput]:
        """Weighs last hidden states into what the head reads.

        Args:
            hidden_states: Each specialist's, on one device. Shapes (batch, seq, hidden).
            *evidence: See `read_evidence`.

        Returns:
            What the head reads, see `Fusion.forward`, and what the gate returned.
        """
        gate_output = self.fusion_gate(hidden_states, *evidence)
        return self.fusion_rule(hidden_states, *gate_output), gate_output

    def _shared_cache(self, cache: Cache | None) -> Cache:
        if cache is None:
            return DynamicCache(config=self.config)
        if not cache.layers and isinstance(cache, DynamicCache):
            # one made without a configuration adds layers as they come, in an order that only one model can have
            cache.layers = DynamicCache(config=self.config).layers
            cache.layer_class_to_replicate = None
        refuse_cache_of_one_shape(self.config, cache)
        if self.fusion_gate.reads_past:
            layer_of(cache)
        return cache


class UltraFuserForCausalLM(UltraFuserPreTrainedModel, GenerationMixin):
    """Several specialist language models that speak as one."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UltraFuserConfig):
        super().__init__(config)
        self.model = UltraFuserModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_specialists(cls, specialists: dict, **kwargs) -> "UltraFuserForCausalLM":
        """Builds a fused model out of specialists: Hub ids, local folders, or models in memory."""
        return fuse_specialists(cls, specialists, **kwargs)

    @property
    def _is_stateful(self) -> bool:
        # recurrent states cannot go back to before a rejected draft, so the library refuses drafts for such models
        return any(causal_class(config)._is_stateful for config in self.config.backbones)

    def __setattr__(self, name: str, value) -> None:
        if name == "lm_head" and not FUSIONS[self.config.fusion].one_head:
            check_head(value, f"fusion={self.config.fusion!r}")
        elif name == "lm_head" and GATES[self.config.gate].reads_past:
            check_head(value, f"the gate {self.config.gate!r}")
        super().__setattr__(name, value)
        if name == "lm_head":
            self.model.wide_head = (value,)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_submodule(self, target: str) -> nn.Module:
        """Like torch's, and shows all embeddings to PEFT's prompt tuning, which guesses at one if it finds none here."""
        return self.get_input_embeddings() if target == PROMPT_TUNING_ASKS_FOR else super().get_submodule(target)

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        specialist_input_ids: Tensor | None = None,
        specialist_attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UltraFuserCausalLMOutput | tuple:
        """Predicts the next token at every position. See `UltraFuserModel.forward` for the inputs it shares.

        Args:
            labels: Token ids to predict, -100 where there is nothing to predict. Not shifted. Shape (batch, seq).
            logits_to_keep: How many last positions to compute logits for, 0 for all; or the positions themselves.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            specialist_input_ids=specialist_input_ids,
            specialist_attention_mask=specialist_attention_mask,
            return_dict=True,
            **kwargs,
        )
        layer = decoding_layer(self.model, getattr(outputs, CACHE), logits_to_keep)
        if layer is not None:
            shares, scales = outputs.gate_weights, outputs.logit_scales
            logits = last_logits(self.model.fusion_rule, self.lm_head.weight, layer, shares, scales)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(outputs[0][:, kept], outputs.gate_weights[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = UltraFuserCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            gate_weights=outputs.gate_weights,
            logit_scales=outputs.logit_scales,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def logits(self, hidden_states: Tensor, gate_weights: Tensor) -> Tensor:
        """What the head says of what `UltraFuserModel.weighed` returns. Shape (batch, seq, vocab)."""
        return self.model.fusion_rule.logits(self.lm_head, hidden_states, gate_weights)

    def _head_columns(self) -> Iterator[slice]:
        return head_columns(self.config)

    @torch.no_grad()
    def gate_weights(self, input_ids: Tensor, **kwargs) -> Tensor:
        """Share of each specialist in each token, without computing logits.

        Args:
            input_ids: Token ids. Shape (batch, seq).
            **kwargs: As for `forward`, for example `attention_mask`.

        Returns:
            Weights in float32 that sum to 1 over specialists. Shape (batch, seq, specialists).
        """
        return self.model(input_ids=input_ids, use_cache=False, return_dict=True, **kwargs).gate_weights

    def specialist(self, name: str) -> PreTrainedModel:
        """One specialist as an ordinary causal language model of its own class, sharing this model's tensors.

        Made anew at each call, for inference: as the draft model in assisted decoding, as a baseline, or as a way out
        with `.save_pretrained(...)`. Do not call `.to(...)` on it: that would move the fused model's tensors. An adapter
        is merged into a copy of the base, which shares the head alone.

        Raises:
            KeyError: If there is no specialist of that name.
            ValueError: If an adapter of PEFT is on the head.
        """
        names = self.config.specialist_names
        if name not in names:
            raise KeyError(f"There is no specialist {name!r}. Choose one of {names}.")
        check_head(self.lm_head, f"`specialist({name!r})`")
        if self.config.adapters is None:
            backbone = self.model.specialists[name]
        else:
            backbone = merged_backbone(self.model.specialists[BASE], names.index(name))
        columns = dict(zip(names, self._head_columns(), strict=True))[name]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(backbone.config))
        place = next(child for child, module in model.named_children() if type(module) is type(backbone))
        setattr(model, place, backbone)
        model.get_output_embeddings().weight = nn.Parameter(self.lm_head.weight.detach()[:, columns], False)
        model.generation_config = copy.deepcopy(self.generation_config)
        if getattr(self, "hf_quantizer", None) is not None and not all(is_plain(p) for p in backbone.parameters()):
            # who quantised the backbone knows how to save it, and what the folder must say to load again
            model.hf_quantizer, model.config.quantization_config = self.hf_quantizer, self.config.quantization_config
        return model.train(self.training)

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
        """Whether what is in the cache must be computed anew, for any specialist."""
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

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer) -> dict:
        # the library hands a function of one's own neither of these, even if it takes them
        both = {"streamer": streamer, "tokenizer": kwargs.get("tokenizer")}
        extracted = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        taken = inspect.signature(custom_generate).parameters if callable(custom_generate) else {}
        return extracted | {key: value for key, value in both.items() if key in taken and value is not None}

    def _get_candidate_generator(self, *, input_ids: Tensor, model_kwargs: dict, **kwargs):
        # a draft model of any kind reads the ordinary input
        own = {"specialist_input_ids", "specialist_attention_mask"}
        generator = super()._get_candidate_generator(
            input_ids=input_ids,
            model_kwargs={key: value for key, value in model_kwargs.items() if key not in own},
            **kwargs,
        )
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
                return candidates[:, : input_ids.shape[1] + room], logits[
                    :, :room
                ] if room and logits is not None else None

            generator.get_candidates = get_candidates
        return generator

    def init_continuous_batching(self, *args, **kwargs):
        """Like the library's, and refuses what one paged cache cannot hold before anything starts.

        Raises:
            ValueError: If the specialists' attention geometry differs, or one does not use the paged cache.
        """
        check_pageable(self.config)
        check_pages(self.config, self.model.specialists)
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs) -> dict:
        """Like the library's, which leaves out or cuts short in silence what went wrong.

        Raises:
            RuntimeError: If a prompt has no whole answer, with the reason.
        """
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
        if self.config.adapters is not None:
            base = self.model.specialists[BASE]
            return masks_for_generate(base)(base.config, inputs_embeds, attention_mask, past_key_values, **kwargs)
        masks = {}
        for k, (name, specialist) in enumerate(self.model.specialists.items()):
            start, end = self.model.first_layers[k : k + 2]
            cache = SpecialistCache(past_key_values, start, end - start)
            mask = masks_for_generate(specialist)(specialist.config, inputs_embeds, attention_mask, cache, **kwargs)
            if isinstance(mask, dict):
                masks |= {f"{name}/{layer_type}": m for layer_type, m in mask.items()}
            else:
                masks[name] = mask
        return masks


class UltraFuserForSequenceClassification(GenericForSequenceClassification, UltraFuserPreTrainedModel):
    """A fused model that scores a whole text, at its last token: a reward model, a classifier."""

    def __init__(self, config: UltraFuserConfig):
        # not the library's, which looks the backbone up by the configuration's class
        UltraFuserPreTrainedModel.__init__(self, config)
        if not FUSIONS[config.fusion].one_head:
            raise ValueError(
                f"A score is read off one hidden state, which a fused model has with {one_head_rules()}, but this one has "
                f"fusion={config.fusion!r}. Fuse the specialists anew with {one_head_rules()}."
            )
        if GATES[config.gate].reads_past:
            raise ValueError(
                f"The gate {config.gate!r} asks how likely every specialist held each token, which their heads tell, but a "
                f"model that scores whole texts has another head in their place. Choose a gate that reads hidden states "
                f"alone, such as 'cross'."
            )
        self.num_labels = config.num_labels
        self.model = UltraFuserModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
