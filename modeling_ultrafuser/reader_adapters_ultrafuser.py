"""Specialists that are adapters of one base, which reads every text in a row for each of them."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from .adapters_ultrafuser import (
    EMBEDDING_RANK,
    HEAD,
    HEAD_RANK,
    MERGE_FIRST,
    AdaptedEmbedding,
    adapter_parameters,
    add_adapters,
    merged_backbone,
)
from .cache_ultrafuser import SpecialistCache
from .causal_ultrafuser import masks_for_generate
from .compat_ultrafuser import CACHE
from .families_ultrafuser import CACHED_LAYERS, of_each, plain_dict, specialist_layer_types
from .inputs_ultrafuser import Tokens, positions_of
from .reader_base_ultrafuser import BASE, Reader, Specialists, run
from .refusals_ultrafuser import Refusal


# no specialist can have this name
THEIR_BASE = "their base"


class AdapterReader(Reader):
    """Runs the base once on all rows: row b * N + k is text b as specialist k of N reads it."""

    one_by_one = False
    shares_head = True

    @classmethod
    def check(cls, config) -> None:
        chosen, first = config.adapters, config.specialists[0]
        if not _is_layout(chosen):
            raise ValueError(
                f"`adapters` says which adapters specialists are, such as {{'rank': 16, 'target_modules': ['q_proj']}}, "
                f"but it is {chosen!r}. Leave it out for specialists that are models of their own."
            )
        unlike = [name for name, plain in of_each(config, plain_dict).items() if plain != plain_dict(first)]
        if unlike:
            raise ValueError(
                f"Adapters of one base have its configuration, but that of {unlike} is not that of "
                f"{config.specialist_names[0]!r}. Fuse merged models instead."
            )
        recurrent = sorted(set(specialist_layer_types(first)) - CACHED_LAYERS)
        if recurrent:
            raise ValueError(
                f"Adapters of one base are rows of one batch with one key-value cache, but {first.model_type!r} has layers "
                f"of the types {recurrent}, which keep other states. Fuse merged models instead."
            )

    @classmethod
    def check_engine(cls, config, engine: str) -> None:
        raise ValueError(
            f"{engine} lays tokens of all texts end to end in one row, but {config.specialist_names} are adapters of one "
            f"base, which reads every text in a row for each. Use `generate` for this model; or take each specialist out "
            f"merged, `model.specialist(name).save_pretrained(...)`, and fuse those."
        )

    @classmethod
    def check_newcomer(cls, config) -> None:
        raise ValueError(
            f"A specialist is put in beside models of their own, but {config.specialist_names} are adapters of one base. "
            f"Fuse all adapters anew with `ultrafuser fuse`, and train the gate."
        )

    @classmethod
    def backbones(cls, configs: list) -> list:
        return configs[:1]

    @classmethod
    def build(cls, config) -> Specialists:
        base = AutoModel.from_config(config.specialists[0])
        add_adapters(base, config)
        return Specialists({BASE: base})

    @classmethod
    def head_columns(cls, config) -> list[slice]:
        """Returns all columns of the head for each specialist: the base's, and those of all adapters of it."""
        more = len(config.specialists) * config.adapters.get(HEAD_RANK, 0)
        return [slice(0, c.hidden_size + more) for c in config.specialists]

    @classmethod
    def sizes(cls, config, sizes: dict, linear: dict[str, torch.Size]) -> dict:
        """Returns the size of the base, and for each specialist that of an adapter of the highest rank."""
        targets = config.adapters["target_modules"]
        widths = [sum(shape) for layer, shape in linear.items() if layer.rpartition(".")[2] in targets]
        base = sizes[config.specialist_names[0]]
        of_table, of_head = (config.adapters.get(field, 0) for field in (EMBEDDING_RANK, HEAD_RANK))
        rows, hidden = config.vocab_size, config.specialists[0].hidden_size
        numbers = config.adapters["rank"] * sum(widths) + of_table * (rows + hidden)
        adapter = replace(
            base, backbone=numbers, embedding=of_table * rows, head=of_head * (rows + hidden), adapter=0, tied=False
        )
        return {THEIR_BASE: base, **dict.fromkeys(sizes, adapter)}

    @classmethod
    def frozen(cls, sizes: dict) -> int:
        return sizes[THEIR_BASE].backbone + sum(size.head for size in sizes.values())

    @property
    def base(self) -> PreTrainedModel:
        """The base's backbone with all adapters."""
        return self.specialists[BASE]

    def read(self, tokens: Tokens, past_key_values: Cache | None, **kwargs) -> list[BaseModelOutput]:
        refused = [key for key in kwargs if key == "cache" or key.startswith("cu_seq_lens")]
        if refused:
            raise ValueError(
                f"Specialists that are adapters of one base are rows of one batch, but {refused} say that texts lie end to "
                f"end in one row. Use `generate` in place of `generate_batch`, and pad instead of packing."
            )
        number = len(self.config.specialists)
        if past_key_values is not None:
            past_key_values = RowCache(past_key_values, number, self.base.config.num_hidden_layers)
        output = run(self.base, as_rows(tokens, number), **{CACHE: past_key_values}, **kwargs)

        def part(values: Tensor | tuple[Tensor, ...], k: int) -> Tensor | tuple[Tensor, ...]:
            return tuple(v[k::number] for v in values) if isinstance(values, tuple) else values[k::number]

        returned = {key: output[key] for key in BaseModelOutput.__annotations__ if output.get(key) is not None}
        if hasattr(self.base, HEAD):
            returned["last_hidden_state"] = getattr(self.base, HEAD)(output.last_hidden_state)
        return [BaseModelOutput(**{key: part(v, k) for key, v in returned.items()}) for k in range(number)]

    def masks(self, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs):
        """As `Reader.masks`: those of the base, one row for each text."""
        return masks_for_generate(self.base, inputs_embeds, attention_mask, past_key_values, **kwargs)

    def input_embeddings(self) -> nn.Module:
        """As `Reader.input_embeddings`: the base's, without adapters that are on it."""
        embedding = self.base.get_input_embeddings()
        return embedding.base_layer if isinstance(embedding, AdaptedEmbedding) else embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        embedding = self.base.get_input_embeddings()
        if isinstance(embedding, AdaptedEmbedding):
            embedding.base_layer = value
        else:
            self.base.set_input_embeddings(value)

    def resize_embeddings(self, *sizes) -> None:
        if self.config.adapters.get(EMBEDDING_RANK):
            raise Refusal(
                f"the token embedding of {self.config.specialist_names} has adapters",
                "Its table and the adapters' have a row for each token, and new tokens have none in the adapters",
                "Resize the base and train adapters of that; or take each specialist out merged, "
                "`model.specialist(name)`, and fuse those.",
            )
        super().resize_embeddings(*sizes)

    def one(self, k: int) -> PreTrainedModel:
        """As `Reader.one`: a copy of the base with the adapter merged into it."""
        return merged_backbone(self.base, k)

    def head_of(self, k: int, head: Tensor) -> Tensor:
        return getattr(self.base, HEAD).merged(k, head) if hasattr(self.base, HEAD) else head

    def shared_parts(self, chosen: list[bool]) -> dict[str, tuple[int, Tensor]]:
        index = torch.tensor(chosen).nonzero()[:, 0]
        names = (n for n, _ in self.specialists.named_parameters() if n.endswith((".lora_A", ".lora_B")))
        parts = {f"model.specialists.{name}": (0, index) for name in names}
        if rank := self.config.adapters.get(HEAD_RANK):
            of_base = torch.ones(self.config.specialists[0].hidden_size, dtype=torch.bool)
            columns = torch.cat([of_base, torch.tensor(chosen).repeat_interleave(rank)])
            parts["lm_head.weight"] = (1, columns.nonzero()[:, 0])
        return parts

    def train_only(self, model: PreTrainedModel, names: list[str]) -> None:
        model.requires_grad_(False)
        for parameter in (*adapter_parameters(self.base), *model.model.fusion_gate.parameters()):
            parameter.requires_grad_(True)

    @torch.no_grad()
    def probe(self, tolerance: float) -> None:
        """As `Reader.probe`: rejects a base that does more with its rows than to read each by itself."""
        ids = (torch.arange(1, 17, device=self.base.device) * 7919 % self.config.vocab_size).view(2, 8)
        outputs = self.read(Tokens(ids), None, use_cache=False)
        for k, name in enumerate(self.config.specialist_names):
            alone = self.one(k)(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state.float()
            differences = outputs[k].last_hidden_state[..., : alone.shape[-1]].float() - alone
            # a typical token's: what rounds otherwise in merged weights can move a single one of a deep model far
            share = (differences.norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-6)).median()
            if not share <= 3 * tolerance:
                raise ValueError(
                    f"Adapters of one base are rows of one batch, but {type(self.base).__name__} does more with a row than "
                    f"to read it by itself: on a probe, hidden states of {name!r} differ by {share.item():.2%}. Instead "
                    f"{MERGE_FIRST}."
                )


def _is_layout(adapters) -> bool:
    """Returns whether a configuration's `adapters` says which layers have adapters, and of which rank."""
    if not isinstance(adapters, dict):
        return False
    ranks = [adapters.get("rank"), *(adapters[f] for f in (EMBEDDING_RANK, HEAD_RANK) if f in adapters)]
    targets = adapters.get("target_modules")
    named = isinstance(targets, list | tuple) and (targets or len(ranks) > 1)
    return bool(named) and all(isinstance(rank, int) and rank >= 1 for rank in ranks)


def as_rows(tokens: Tokens, specialists: int) -> Tokens:
    """Repeats every text once for each specialist, or lays its views one below the other."""

    def rows(part: Tensor | dict[str, Tensor] | None):
        if isinstance(part, dict):
            return {key: rows(mask) for key, mask in part.items()}
        return None if part is None else part.repeat_interleave(specialists, dim=0)

    ids, mask, positions, all_ids, all_masks = tokens
    ids = rows(ids) if all_ids is None else all_ids.flatten(0, 1)
    if all_masks is not None:
        mask = all_masks.flatten(0, 1)
        return Tokens(ids, mask, positions_of(mask, ids.shape[-1]))
    if positions is not None and len(positions) > 1:
        positions = rows(positions)
    return Tokens(ids, rows(mask), positions)


class RowCache(SpecialistCache):
    """The shared cache as the base sees it: one row for each specialist of each text.

    The shared cache itself holds one row for each text, specialists' heads side by side, so that `generate` reorders,
    repeats and crops it like any other.
    """

    def __init__(self, cache: Cache, specialists: int, length: int):
        super().__init__(cache, 0, length)
        self.specialists = specialists

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        texts = [s.reshape(-1, self.specialists * s.shape[1], *s.shape[2:]) for s in (key_states, value_states)]
        kept = super().update(*texts, layer_idx, *args, **kwargs)
        return tuple(s.reshape(-1, s.shape[1] // self.specialists, *s.shape[2:]) for s in kept)
