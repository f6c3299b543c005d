"""The fused model: several specialist backbones, a gate, and one wide head.

With last hidden states h_k, heads W_k and gate weights w_k, the paper's fused logits (Ding et al., 2024, Eq. 1) are

    sum_k w_k (h_k W_k^T)  =  [w_1 h_1, ..., w_N h_N] [W_1, ..., W_N]^T

so that a fused model is an ordinary causal language model: `UltraFuserModel` returns the gate-scaled hidden states
side by side, and `lm_head` holds the specialists' heads side by side.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache_ultrafuser import refuse_cache_of_one_shape
from .carrying_ultrafuser import Carrier
from .checkpoint_ultrafuser import is_plain
from .compat_ultrafuser import CACHE, attention_of, engine_of, set_attention, set_layers, takes_cache
from .configuration_ultrafuser import UltraFuserConfig, attention_of_all
from .evidence_ultrafuser import decoding_layer, last_logits, layer_of, read_evidence
from .fusing_ultrafuser import fuse_specialists
from .fusions_ultrafuser import check_loss, fusion_class, one_head_rules
from .gate_base_ultrafuser import GateOutput, Reads, run_before_specialists
from .gates_ultrafuser import GATES
from .generation_ultrafuser import FusedGeneration
from .inputs_ultrafuser import Tokens, check_checkpointed, check_inputs, checked_prior, refuse_router_loss
from .outputs_ultrafuser import (
    UltraFuserCausalLMOutput,
    UltraFuserMixtureOutput,
    UltraFuserModelOutput,
    end_to_end,
    selected,
)
from .peft_ultrafuser import check_head
from .pretrained_ultrafuser import UltraFuserPreTrainedModel
from .reader_base_ultrafuser import Reader
from .readers_ultrafuser import reader_of
from .serving_ultrafuser import check_servable, prepared_for_engine


# a path that no fused model has
PROMPT_TUNING_ASKS_FOR = "embeddings.word_embeddings"


class UltraFuserModel(UltraFuserPreTrainedModel):
    """The specialists' backbones and the gate.

    Building it loads nothing: weights come from `from_pretrained`, or from `UltraFuserForCausalLM.from_specialists`.

    Args:
        config: Of the fused model.
        alone: Whether no model of ours is around it. Engines build it alone, and put a head of their own beside it.
    """

    def __init__(self, config: UltraFuserConfig, alone: bool = True):
        super().__init__(config)
        if not config.specialists:
            raise ValueError(
                "A fused model needs specialists, but the configuration names none. Build one with "
                "`UltraFuserForCausalLM.from_specialists({'text': ..., 'code': ...})`."
            )
        refuse_router_loss(None, config)
        self.engine = engine_of(config) if alone else None
        if self.engine is not None:
            check_servable(config, self.engine)
        self.reader_class = reader_of(config)
        self.specialists = self.reader_class.build(config)
        self.fusion_gate = GATES[config.gate](config)
        self.fusion_rule = fusion_class(config.fusion)(config)
        # set by the model that has a head, for gates that read the past; in a tuple, so that it is no part of the backbone
        self.wide_head: tuple[nn.Module, ...] = ()
        self.carrier: Carrier | None = None if self.engine is None else prepared_for_engine(self)
        self.resized = False
        self._tell_attention()
        self.post_init()

    @property
    def reader(self) -> Reader:
        """Returns the reader that brings tokens to the specialists. Made anew at each call: its modules are parts of the model."""
        return self.reader_class(self.config, self.specialists)

    def _tell_attention(self) -> None:
        """Writes into the configuration how specialists attend: as all do, or else as all can."""
        chosen = attention_of_all(self.config)
        own = {name: attention_of(c) for name, c in zip(*self.config._names_and_configs(), strict=True)}
        set_attention(self.config, own | {"": chosen or "eager"})

    def get_input_embeddings(self) -> nn.Module:
        """Returns every specialist's, as one module. Adapters of one base have a single one."""
        return self.reader.input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets every specialist's, from what `get_input_embeddings` returns or anything else with theirs by name.

        Raises:
            ValueError: If that is one embedding, for several specialists.
        """
        self.reader.set_input_embeddings(value)

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
        gate_prior: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UltraFuserModelOutput | UltraFuserMixtureOutput | tuple:
        """Lets every specialist read the tokens, weighs their last hidden states, and mixes them.

        Args:
            input_ids: Token ids, the same for every specialist. Shape (batch, seq).
            attention_mask: 1 for tokens, 0 for padding; or prepared masks. Shape (batch, past + seq).
            position_ids: Positions of the tokens. Shape (batch, seq).
            past_key_values: One cache for all specialists.
            inputs_embeds: Rejected: specialists embed the same token differently. vLLM asks for the argument.
            use_cache: Whether to return a cache. Default: no in training, else as the configuration says.
            specialist_input_ids: The prompt in each specialist's own words, padded on the left to one length.
                Shape (batch, specialists, seq).
            specialist_attention_mask: Its mask. Shape (batch, specialists, past + seq).
            gate_prior: Weights of the specialists for each whole text, which the gate's are multiplied by and made to sum to 1
                again. Ones change nothing; a single one that is not 0 leaves one specialist alone. Shape (batch, specialists).
            output_hidden_states: Whether to return every layer's hidden states, or indices of those to return.
            output_attentions: Whether to return attention weights.
            return_dict: Whether to return a named output instead of a tuple.
            **kwargs: Passed on to every specialist untouched.

        Raises:
            ValueError: If `inputs_embeds` is given, or `input_ids` is not, or a per-specialist input has a wrong shape, or a
                prior cannot weigh the specialists.
        """
        tokens = Tokens(input_ids, attention_mask, position_ids, specialist_input_ids, specialist_attention_mask)
        check_inputs(self.config.specialist_names, tokens, inputs_embeds)
        prior = checked_prior(gate_prior, self.config.specialist_names, input_ids)
        if prior and not self.fusion_rule.reads_gate:
            raise ValueError(
                f"`gate_prior` multiplies the gate's weights, which fusion={self.config.fusion!r} does not read. Leave it out."
            )
        refuse_router_loss(kwargs.pop("output_router_logits", None), self.config, *self.config.backbones)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = self.shared_cache(past_key_values) if use_cache or past_key_values is not None else None
        for key, asked in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
            if getattr(self.config, key) if asked is None else asked:
                kwargs[key] = True
        gate_output = run_before_specialists(self.fusion_gate, input_ids, **prior)
        outputs = self.reader.read(tokens, cache, use_cache=use_cache, **kwargs)
        # a device map may have put the specialists on several devices
        device = outputs[-1].last_hidden_state.device
        states = [o.last_hidden_state.to(device) for o in outputs]
        evidence = self._evidence(states, tokens, cache, kwargs.get("cu_seq_lens_q"))
        fused, gate_output = self.weighed(states, *evidence, gate_output=gate_output, **prior)

        output = self.fusion_rule.output_class(
            fused,
            **{CACHE: cache},
            hidden_states=selected(end_to_end(outputs, "hidden_states", fused), output_hidden_states),
            attentions=end_to_end(outputs, "attentions"),
            gate_weights=gate_output.weights,
            logit_scales=gate_output.scales,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _evidence(
        self, states: list[Tensor], tokens: Tokens, cache: Cache | None, cu_seq_lens: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns what the gate reads besides hidden states: from the carrier in vLLM, else see `read_evidence`."""
        if self.carrier is not None:
            return (self.carrier(states, tokens.input_ids, tokens.position_ids, self.wide_head[0].weight),)
        return read_evidence(self, states, tokens, cache, cu_seq_lens)

    def weighed(
        self, hidden_states: list[Tensor], *evidence: Tensor, gate_output: GateOutput | None = None, **prior: Tensor
    ) -> tuple[Tensor, GateOutput]:
        """Runs the gate, unless it has run, and scales the last hidden states by its output: the input of the head.

        Args:
            hidden_states: Each specialist's, on one device. Shapes (batch, seq, hidden).
            *evidence: See `read_evidence`.
            gate_output: Output of a gate that has run before the specialists.
            **prior: `prior` of the gate, if there is one.

        Returns:
            What the head reads, see `Fusion.forward`, and what the gate returned.
        """
        if gate_output is None:
            gate_output = self.fusion_gate(hidden_states, *evidence, **prior)
        device = hidden_states[0].device
        gate_output = GateOutput(*(None if t is None else t.to(device) for t in gate_output))
        return self.fusion_rule(hidden_states, *gate_output), gate_output

    def shared_cache(self, cache: Cache | None) -> Cache:
        """Returns a cache with layers for every specialist, and for what the gate reads of the past.

        Raises:
            ValueError: If the one that is given has no room for them, or cannot be read on while training; or if an
                engine built the model, which keeps keys and values itself.
        """
        if self.engine is not None:
            raise ValueError(
                f"This backbone attends by {self.engine!r}, which transformers does not know: its layers are numbered for "
                f"an engine that keeps keys and values itself, but a cache was asked for. Pass `use_cache=False`, or build "
                f"the whole model, `AutoModelForCausalLM`, for attention of your own."
            )
        if cache is None:
            cache = DynamicCache(config=self.config)
        elif not cache.layers and isinstance(cache, DynamicCache):
            # layers that came as specialists run would be in an order that only one model can have
            set_layers(cache, self.config)
        refuse_cache_of_one_shape(self.config, cache)
        if Reads.PAST in self.fusion_gate.reads:
            layer_of(cache)
        # transformers' property of that is deprecated under one name, and new under the other
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            check_checkpointed(cache)
        return cache


class UltraFuserForCausalLM(FusedGeneration, UltraFuserPreTrainedModel, GenerationMixin):
    """Several specialist language models that speak as one."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UltraFuserConfig):
        super().__init__(config)
        self.model = UltraFuserModel(config, alone=False)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_specialists(cls, specialists: dict, **kwargs) -> "UltraFuserForCausalLM":
        """Builds a fused model out of specialists: Hub ids, local folders, or models in memory."""
        return fuse_specialists(cls, specialists, **kwargs)

    def __setattr__(self, name: str, value) -> None:
        if name == "lm_head" and not fusion_class(self.config.fusion).one_head:
            check_head(value, f"fusion={self.config.fusion!r}")
        elif name == "lm_head" and Reads.PAST in GATES[self.config.gate].reads:
            check_head(value, f"the gate {self.config.gate!r}")
        super().__setattr__(name, value)
        if name == "lm_head":
            self.model.wide_head = (value,)

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
        gate_prior: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UltraFuserCausalLMOutput | tuple:
        """Predicts the next token at every position. See `UltraFuserModel.forward` for the inputs it shares.

        Args:
            labels: Token ids to predict, -100 where there is nothing to predict. Not shifted. Shape (batch, seq).
            logits_to_keep: How many last positions to compute logits for, 0 for all; or the positions themselves.

        Raises:
            ValueError: If `labels` are given, and the fusion rule has no loss.
        """
        if labels is not None:
            check_loss(self.config)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            specialist_input_ids=specialist_input_ids,
            specialist_attention_mask=specialist_attention_mask,
            gate_prior=gate_prior,
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
        """Applies the head to the output of `UltraFuserModel.weighed`. Shape (batch, seq, vocab)."""
        return self.model.fusion_rule.logits(self.lm_head, hidden_states, gate_weights)

    def head_columns(self) -> list[slice]:
        """Returns each specialist's columns of the head."""
        return self.model.reader_class.head_columns(self.config)

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
        is merged into a copy of the base, which shares the head alone, if no adapter is on that.

        Raises:
            KeyError: If there is no specialist of that name.
            ValueError: If an adapter of PEFT is on the head.
        """
        names = self.config.specialist_names
        if name not in names:
            raise KeyError(f"There is no specialist {name!r}. Choose one of {names}.")
        check_head(self.lm_head, f"`specialist({name!r})`")
        k = names.index(name)
        backbone, head = self.model.reader.one(k), self.model.reader.head_of(k, self.lm_head.weight.detach())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(backbone.config))
        place = next(child for child, module in model.named_children() if type(module) is type(backbone))
        setattr(model, place, backbone)
        model.get_output_embeddings().weight = nn.Parameter(head, False)
        model.generation_config = copy.deepcopy(self.generation_config)
        if getattr(self, "hf_quantizer", None) is not None and not all(is_plain(p) for p in backbone.parameters()):
            # who quantised the backbone knows how to save it, and what the folder must say to load again
            model.hf_quantizer, model.config.quantization_config = self.hf_quantizer, self.config.quantization_config
        return model.train(self.training)


class UltraFuserForSequenceClassification(GenericForSequenceClassification, UltraFuserPreTrainedModel):
    """A fused model that scores a whole text, at its last token: a reward model, a classifier."""

    def __init__(self, config: UltraFuserConfig):
        # not the library's, which looks the backbone up by the configuration's class
        UltraFuserPreTrainedModel.__init__(self, config)
        if not fusion_class(config.fusion).one_head:
            raise ValueError(
                f"A score is read off one hidden state, which a fused model has with {one_head_rules()}, but this one has "
                f"fusion={config.fusion!r}. Fuse the specialists anew with {one_head_rules()}."
            )
        if Reads.PAST in GATES[config.gate].reads:
            raise ValueError(
                f"The gate {config.gate!r} asks how likely every specialist held each token, which their heads tell, but a "
                f"model that scores whole texts has another head in their place. Choose a gate that reads hidden states "
                f"alone, such as 'cross'."
            )
        self.num_labels = config.num_labels
        self.model = UltraFuserModel(config, alone=False)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
