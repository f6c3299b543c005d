"""Specialists of one shape as one pass: their weights stacked, their matrix products batched.

Decoding with small specialists is bound by the number of operations, not by their size. N specialists of one shape need
no more operations than one: every linear layer is one batched product over the specialist axis, and N times as many
heads attend at once, so that one ordinary key-value cache holds them all.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.evidence_ultrafuser import EvidenceLayer
from modeling_ultrafuser.families_ultrafuser import heads_of, specialist_layer_types
from modeling_ultrafuser.inputs_ultrafuser import Tokens
from modeling_ultrafuser.reader_base_ultrafuser import Reader

from ..compat import attention_as_llama


# decoder layers that differ from Llama's in nothing but biases and norms of queries and keys
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# angles that do not depend on how long the text is
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# what must be one number for all, besides the shapes
SHARED = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps")
# products that read the same input are made at once
LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = {
    "before_attention": "input_layernorm",
    "before_mlp": "post_attention_layernorm",
    "query": "self_attn.q_norm",
    "key": "self_attn.k_norm",
}


def stack(model: UltraFuserForCausalLM) -> "StackedForCausalLM":
    """The same fused model with its specialists run in one pass, for inference.

    It holds a copy of the specialists' weights, and shares gate and head: `model = stack(model)` keeps one copy. Saving
    gives the ordinary folder; `unstack` the ordinary model. Adapters must be merged first.

    Args:
        model: A fused model whose specialists have one shape and are Llamas, Mistrals without a window, or Qwens.

    Raises:
        ValueError: If the specialists cannot be stacked, naming the first that differs and how.
    """
    check_stackable(model)
    return StackedForCausalLM(model).eval()


def unstack(model: "StackedForCausalLM") -> UltraFuserForCausalLM:
    """The ordinary fused model, bit for bit as it was before `stack`. Its specialists' weights are copies."""
    with torch.device("meta"):
        ordinary = UltraFuserForCausalLM(model.config)
    ordinary.model.fusion_gate, ordinary.lm_head = model.model.fusion_gate, model.lm_head
    for k, specialist in enumerate(ordinary.model.specialists.values()):
        specialist.load_state_dict(model.model.specialists.specialist_state(k), assign=True)
        # what no checkpoint holds
        specialist.rotary_emb = type(specialist.rotary_emb)(specialist.config).to(model.device)
    ordinary.generation_config = model.generation_config
    return ordinary.eval()


def check_stackable(model: UltraFuserForCausalLM) -> None:
    """Refuses specialists that cannot be run in one pass.

    Raises:
        ValueError: Naming the first specialist that cannot, and why.
    """
    way_out = "Decode with the ordinary model: `model.generate(...)`."
    if not model.model.reader_class.one_by_one:
        kind = "adapters of one base" if model.config.adapters else "stacked"
        raise ValueError(
            f"Specialists that run one by one can be stacked, but {model.config.specialist_names} are {kind}, which run in "
            f"one pass already. {way_out}"
        )
    specialists = model.model.specialists
    first_name, first = next(iter(specialists.items()))
    for name, specialist in specialists.items():
        config = specialist.config
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"Only specialists built like Llama can be stacked ({', '.join(FAMILIES)}), but {name!r} is "
                f"{config.model_type!r}. {way_out}"
            )
        if set(specialist_layer_types(config)) != {"full_attention"}:
            raise ValueError(
                f"Stacked specialists attend to everything before them, but {name!r} has a window of "
                f"{config.sliding_window} tokens. {way_out}"
            )
        if specialist.rotary_emb.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"Stacked specialists rotate by fixed angles ({', '.join(ROPE_TYPES)}), but those of {name!r} change "
                f"with the length of the text ({specialist.rotary_emb.rope_type!r}). {way_out}"
            )
        if changed := [n for n, m in specialist.named_modules() if n.endswith("_proj") and type(m) is not nn.Linear]:
            raise ValueError(
                f"Stacking needs plain linear layers, but {name}.{changed[0]} is adapted or quantised. Merge adapters "
                f"first (`merge_and_unload()`), or decode with the ordinary model."
            )
        if unlike := _differences(first, specialist):
            raise ValueError(
                f"Specialists of one shape can be stacked, but {first_name!r} and {name!r} differ: {unlike}. {way_out}"
            )


def _differences(one: nn.Module, other: nn.Module) -> str:
    for field in SHARED:
        a, b = getattr(one.config, field), getattr(other.config, field)
        if a != b:
            return f"`{field}` is {a} and {b}"
    a, b = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (one, other))
    for name in [*a, *b]:
        if a.get(name) != b.get(name):
            return f"`{name}` is {a.get(name, 'absent')} and {b.get(name, 'absent')}"
    return ""


# what only specialists that run one by one read or return
ONE_BY_ONE = (
    *("specialist_input_ids", "specialist_attention_mask"),
    *("output_hidden_states", "output_attentions", "cache"),
)


class StackedForCausalLM(UltraFuserForCausalLM):
    """A fused model whose specialists run in one pass. Made by `stack`."""

    def __init__(self, model: UltraFuserForCausalLM):
        with torch.device("meta"):
            super().__init__(model.config)
        self.model.specialists, self.model.reader_class = StackedSpecialists(model), StackedReader
        self.model.fusion_gate, self.lm_head = model.model.fusion_gate, model.lm_head
        self.generation_config = model.generation_config

    # no folder holds its code, and transformers looks at every step of a model whose folder does
    _auto_class = None

    def resize_token_embeddings(self, *args, **kwargs):
        """Rejects it: a stacked model is for inference."""
        raise ValueError("A stacked model is for inference. Resize the ordinary one, and stack that.")

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves the ordinary fused model."""
        unstack(self).save_pretrained(save_directory, **kwargs)


class StackedReader(Reader):
    """Runs all specialists at once, with their heads side by side in an ordinary cache."""

    one_by_one = False

    @classmethod
    def check_engine(cls, config, engine: str) -> None:
        raise ValueError(
            f"{engine} needs pages of keys and values, but a stacked model has no paged cache: its specialists' lie side by "
            f"side. Use `generate`, or the ordinary model: `unstack(model).generate_batch(...)`."
        )

    def read(
        self, tokens: Tokens, past_key_values: Cache | None, use_cache: bool | None = None, **kwargs
    ) -> list[BaseModelOutput]:
        """As `Reader.read`, but returns last hidden states only.

        Raises:
            ValueError: If asked for what only specialists run one by one can give.
        """
        asked = tokens._asdict() | kwargs
        if refused := [key for key in ONE_BY_ONE if asked.get(key) is not None and asked[key] is not False]:
            raise ValueError(
                f"A stacked model reads one prompt of token ids and returns last hidden states only, but got {refused}. "
                f"Ask the ordinary model: `unstack(model)`."
            )
        if isinstance(past_key_values, DynamicCache):
            # those of the other specialists stay empty, which not every version can shorten
            layers, count = past_key_values.layers, len(self.specialists.layers)
            layers[count:] = [layer for layer in layers[count:] if isinstance(layer, EvidenceLayer)]
        hidden = self.specialists(tokens.input_ids, tokens.attention_mask, tokens.position_ids, past_key_values)
        return [BaseModelOutput(last_hidden_state=h) for h in hidden]

    def masks(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, position_ids=None, **kwargs
    ) -> Tensor | None:
        """As `Reader.masks`: one for all specialists."""
        first = self.config.specialists[0]
        return create_causal_mask(first, inputs_embeds, attention_mask, past_key_values, position_ids)

    def one(self, k: int):
        """Rejects it: the specialists are not modules of their own here."""
        name = self.config.specialist_names[k]
        raise ValueError(f"A stacked model holds no specialist on its own. Ask `unstack(model).specialist({name!r})`.")


class StackedSpecialists(nn.Module):
    """The backbones as one.

    Hidden states have the shape (specialists, batch * seq, hidden) from the embedding to the last norm.
    """

    is_causal = True

    def __init__(self, model: UltraFuserForCausalLM):
        super().__init__()
        specialists = list(model.model.specialists.values())
        # speaks for all in what `check_stackable` asked for
        self.first = first = model.config.specialists[0]
        self.heads, self.key_heads, self.head_dim = heads_of(first)
        # asked for by the library's attention functions; groups stay whole when specialists' heads lie side by side
        self.num_key_value_groups = self.heads // self.key_heads
        self.register_buffer("epsilon", torch.tensor(first.rms_norm_eps), persistent=False)
        self.embedding = _stacked([s.embed_tokens.weight for s in specialists])
        layers = zip(*(s.layers for s in specialists), strict=True)
        self.layers = nn.ModuleList(StackedLayer(own) for own in layers)
        self.norm = _stacked([s.norm.weight[None] for s in specialists])
        self.register_buffer("angles", torch.stack([s.rotary_emb.inv_freq for s in specialists]), persistent=False)
        scales = torch.tensor([s.rotary_emb.attention_scaling for s in specialists], device=self.angles.device)
        self.register_buffer("angle_scales", scales[:, None, None, None, None], persistent=False)
        self.activation = ACT2FN[first.hidden_act]

    def specialist_state(self, k: int) -> dict[str, Tensor]:
        """One specialist's weights by their ordinary names."""
        state = {"embed_tokens.weight": self.embedding[k].clone(), "norm.weight": self.norm[k, 0].clone()}
        for i, layer in enumerate(self.layers):
            state |= {f"layers.{i}.{key}": weight for key, weight in layer.specialist_state(k).items()}
        return state

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Returns all last hidden states. Shape (specialists, batch, seq, hidden)."""
        batch, seq = input_ids.shape
        hidden = self.embedding.index_select(1, input_ids.flatten())
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(seq, device=input_ids.device) + past)[None]
        mask = create_causal_mask(self.first, hidden[0].view(batch, seq, -1), attention_mask, cache, position_ids)
        rotation = self.rotation(position_ids, hidden.dtype)
        for i, layer in enumerate(self.layers):
            normed = _rms_norm(hidden, layer.before_attention, self.epsilon)
            attended = self.attention(layer, i, normed, rotation, mask, cache, batch)
            hidden = layer.out(attended, onto=hidden)
            gate, up = layer.gate_up(_rms_norm(hidden, layer.before_mlp, self.epsilon)).chunk(2, dim=-1)
            hidden = layer.down(self.activation(gate) * up, onto=hidden)
        return _rms_norm(hidden, self.norm, self.epsilon).view(-1, batch, seq, hidden.shape[-1])

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of every specialist's angles. Shapes (specialists, batch, seq, 1, head_dim)."""
        angles = position_ids[None, ..., None, None].float() * self.angles[:, None, None, None].float()
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return (cos * self.angle_scales).to(dtype), (sin * self.angle_scales).to(dtype)

    def attention(
        self,
        layer: "StackedLayer",
        i: int,
        hidden: Tensor,
        rotation,
        mask: Tensor | None,
        cache: Cache | None,
        batch: int,
    ) -> Tensor:
        """All specialists' heads side by side. Shape (specialists, batch * seq, heads * head_dim)."""
        count, rows, _ = hidden.shape
        states = layer.qkv(hidden).view(count, batch, rows // batch, -1, self.head_dim)
        turning, values = states.split_with_sizes([self.heads + self.key_heads, self.key_heads], dim=-2)
        if layer.query is not None:
            own = turning.split([self.heads, self.key_heads], dim=-2)
            norms = (layer.query, layer.key)
            turning = torch.cat([_rms_norm(s, n, self.epsilon) for s, n in zip(own, norms, strict=True)], dim=-2)
        cos, sin = rotation
        turning = torch.addcmul(turning * cos, turning.roll(self.head_dim // 2, dims=-1), sin)
        queries, keys = turning.split_with_sizes([self.heads, self.key_heads], dim=-2)
        # (specialists, batch, seq, heads, head_dim) to (batch, specialists * heads, seq, head_dim)
        queries, keys, values = (s.permute(1, 0, 3, 2, 4).flatten(1, 2) for s in (queries, keys, values))
        if cache is not None:
            keys, values = cache.update(keys, values, i)
        attended, _ = attention_as_llama(self.first)(self, queries, keys, values, mask, scaling=self.head_dim**-0.5)
        return attended.reshape(rows, count, -1).transpose(0, 1)


class StackedLayer(nn.Module):
    """One decoder layer of every specialist."""

    def __init__(self, layers: tuple[nn.Module, ...]):
        super().__init__()
        for name, parts in LINEARS.items():
            setattr(self, name, StackedLinear(parts, [[m.get_submodule(p) for p in parts] for m in layers]))
        for name, place in NORMS.items():
            owner, _, leaf = place.rpartition(".")
            norms = [getattr(m.get_submodule(owner), leaf, None) for m in layers]
            # those of queries and keys are for every head: (specialists, 1, 1, 1, head_dim)
            shape = (1, -1) if not owner else (1, 1, 1, -1)
            setattr(self, name, None if norms[0] is None else _stacked([n.weight.view(shape) for n in norms]))

    def specialist_state(self, k: int) -> dict[str, Tensor]:
        """One specialist's weights by their ordinary names, within the layer."""
        norms = {f"{place}.weight": getattr(self, name) for name, place in NORMS.items()}
        state = {key: norm[k].flatten().clone() for key, norm in norms.items() if norm is not None}
        for name in LINEARS:
            state |= getattr(self, name).specialist_state(k)
        return state


class StackedLinear(nn.Module):
    """Linear layers that read the same input, of all specialists, as one batched product."""

    def __init__(self, names: tuple[str, ...], specialists: list[list[nn.Linear]]):
        super().__init__()
        self.names, self.rows = names, [m.out_features for m in specialists[0]]
        # input first: the library multiplies a few rows by it in one sweep
        self.weight = _stacked([torch.cat([m.weight for m in own]).T for own in specialists])
        # these families have biases in all of the layers that read one input, or in none
        biased = specialists[0][0].bias is not None
        self.bias = _stacked([torch.cat([m.bias for m in own])[None] for own in specialists]) if biased else None

    def forward(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """The products, added to `onto` where given. Shape (specialists, rows, out)."""
        if onto is not None and self.bias is not None:
            onto = onto + self.bias
        onto = self.bias if onto is None else onto
        return torch.bmm(hidden, self.weight) if onto is None else torch.baddbmm(onto, hidden, self.weight)

    def specialist_state(self, k: int) -> dict[str, Tensor]:
        """One specialist's weights and biases by their ordinary names."""
        parts = {"weight": self.weight[k].T} | ({} if self.bias is None else {"bias": self.bias[k, 0]})
        return {
            f"{name}.{key}": own.clone(memory_format=torch.contiguous_format)
            for key, part in parts.items()
            for name, own in zip(self.names, part.split(self.rows), strict=True)
        }


def _stacked(tensors: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([t.detach() for t in tensors]), requires_grad=False)


def _rms_norm(hidden: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    # the weight is each specialist's own, which torch's function has no place for; and without one this is faster
    states = hidden.float()
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    scale = torch.addcmul(epsilon, length, length, value=1 / hidden.shape[-1]).rsqrt_()
    return weight * (states * scale).to(hidden.dtype)
