"""Private parts of transformers and vLLM that a fused model relies on, each behind a name of its own.

Seen in transformers 5.23 and vLLM 0.32. `tests/contracts/` holds a test of each: a release that changes one breaks
there and here, and nowhere else.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file


# ---- caches

OLD_CACHE = "past_key_values"
# from 5.24 on it is "cache", as an argument and in outputs
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", OLD_CACHE))
# from 5.24 on the paged cache changes what attention was given, `max_length_k` among it, in place
PAGES_CHANGE_KWARGS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


def takes_cache(method: Callable) -> Callable:
    """Lets a method with an argument `past_key_values` be given it as `cache`, where that is its name in transformers.

    The pages of continuous batching always came as `cache`, beside it, and still do.
    """
    if CACHE == OLD_CACHE:
        # engines compile the method by its own code
        return method

    @wraps(method)
    def taking(*args, **kwargs):
        if "cache" in kwargs and not isinstance(kwargs["cache"], PagedAttentionCache):
            kwargs[OLD_CACHE] = kwargs.pop("cache")
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    parameters = [p.replace(name=CACHE) if p.name == OLD_CACHE else p for p in signature.parameters.values()]
    taking.__signature__ = signature.replace(parameters=parameters)
    return taking


def init_without_layers(cache: Cache) -> None:
    """Sets what `Cache.__init__` sets beside the layers, which it would make anew."""
    cache.layer_class_to_replicate = None
    cache.offloading = False


def forget_last(cache: Cache, tokens: int) -> None:
    """Forgets the last tokens of a dynamic cache, and nothing else.

    `crop` also restricts windows to their size, after which they cannot be gone back in once more.
    """
    for layer in cache.layers:
        if tokens and layer.is_initialized:
            layer.keys, layer.values = layer.keys[:, :, :-tokens], layer.values[:, :, :-tokens]
            if layer.is_sliding:
                layer.cumulative_length -= tokens


def set_layers(cache: DynamicCache, config: PreTrainedConfig) -> None:
    """Gives an empty cache the layers of a configuration: one made without adds them as they come, of one class."""
    cache.layers = DynamicCache(config=config).layers
    cache.layer_class_to_replicate = None


# ---- attention


def attention_of(config: PreTrainedConfig) -> str | None:
    """Returns the name by which attention functions are looked up (`_attn_implementation`)."""
    return config._attn_implementation


def set_attention(config: PreTrainedConfig, names: dict[str, str | None]) -> None:
    """Sets it for a configuration, under "", and for its `sub_configs` by name: one string would change all of them."""
    config._attn_implementation = names


VLLM = "vllm"


def engine_of(config: PreTrainedConfig) -> str | None:
    """Returns the name of the engine that builds the model, or None: "vllm", "sglang".

    Before it builds a model an engine registers its attention under its name, and writes that name into the
    configuration. Names of attention that is part of transformers, or a kernel of the Hub ("owner/name"), are no engine's.
    """
    name = config._attn_implementation
    function = None if name is None or "/" in name else ALL_ATTENTION_FUNCTIONS.get(name)
    return None if function is None or getattr(function, "__module__", "").startswith("transformers.") else name


class CarrierLayer(nn.Module):
    """A layer of attention without weights.

    Args:
        config: Of a specialist, which says by what attention runs.
        layer_idx: Its number among all layers.
    """

    is_causal = True
    scaling = 1.0

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends. All are (1, heads, tokens, head size). Returns (tokens, heads * head size)."""
        # vLLM finds layers by these two lines, in the source, and `scaling` by its name
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return attention(self, query, key, value, None, scaling=self.scaling)[0]


def number_layers(module: nn.Module, start: int) -> None:
    """Counts a specialist's layers from a number on: engines look their attention up by `layer_idx`, among all layers."""
    for part in module.modules():
        if isinstance(getattr(part, "layer_idx", None), int):
            part.layer_idx += start


def cache_dtypes(layers: nn.ModuleList, default) -> set:
    """Returns the types in which vLLM caches layers: it puts an `attn` with `kv_cache_torch_dtype` on each."""
    return {getattr(getattr(layer, "attn", None), "kv_cache_torch_dtype", default) for layer in layers}


# ---- loading and resizing


class LoadingHooks:
    """Mixin before `PreTrainedModel`, whose loading calls these. A subclass defines `check_loaded(loading_info)`."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that loading fills whatever a saved folder does not hold as it does for transformers' own models.

        In other people's code it passes over modules without tensors of their own, backbones among them: the buffers
        that Falcon-H1 fills there, for one, would be left as whatever was in memory.
        """
        return False

    @classmethod
    def get_init_context(cls, *args, **kwargs) -> list:
        """As `PreTrainedModel`'s, without drawing numbers for tensors that are loaded right after."""
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # the last step before loading reports, with a table of shapes or a mere warning
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self.check_loaded(loading_info)


def forget(loading_info) -> None:
    """Empties what loading would report, on top of an error, or raise in place of it."""
    for keys in (loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys):
        keys.clear()


def file_if_any(source: str | os.PathLike, name: str, **hub) -> str | None:
    """Returns the path of a file of a folder or a repository, downloaded if need be, or None if there is none."""
    return cached_file(source, name, **{**hub, "_raise_exceptions_for_missing_entries": False})


def resized_head(model: PreTrainedModel, head: nn.Linear, rows: int, mean_resizing: bool) -> nn.Linear:
    """Returns a head of so many rows, new ones as `resize_token_embeddings` makes them."""
    return model._get_resized_lm_head(head, rows, mean_resizing=mean_resizing)


# ---- what classes tell of themselves


class CollectedPlans(nn.ModuleDict):
    """Models by name, which tells of all what `PreTrainedModel.post_init` collects.

    It collects from its direct children only, by attribute name: without these properties `device_map="auto"` could cut
    a decoder layer in two and tensor-parallel plans would be empty.
    """

    _no_split_modules = property(lambda self: self._union("_no_split_modules"))
    _keep_in_fp32_modules = property(lambda self: self._union("_keep_in_fp32_modules"))
    _keep_in_fp32_modules_strict = property(lambda self: self._union("_keep_in_fp32_modules_strict"))
    _skip_keys_device_placement = property(lambda self: self._union("_skip_keys_device_placement"))
    _keys_to_ignore_on_load_unexpected = property(lambda self: self._union("_keys_to_ignore_on_load_unexpected"))
    _keys_to_ignore_on_load_missing = property(lambda self: self._union("_keys_to_ignore_on_load_missing"))
    _keys_to_ignore_on_save = property(lambda self: self._prefixed_set("_keys_to_ignore_on_save"))
    _tp_plan = property(lambda self: self._prefixed_dict("_tp_plan"))
    _ep_plan = property(lambda self: self._prefixed_dict("_ep_plan"))
    _fsdp_plan = property(lambda self: self._prefixed_dict("_fsdp_plan"))

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        pairs = [(name, tied) for name, m in self.items() for tied in m.all_tied_weights_keys.items()]
        return {f"{name}.{target}": f"{name}.{source}" for name, (target, source) in pairs}

    def _union(self, field: str) -> set[str]:
        return {entry for m in self.values() for entry in getattr(m, field, None) or ()}

    def _prefixed_set(self, field: str) -> set[str]:
        return {f"{name}.{entry}" for name, m in self.items() for entry in getattr(m, field, None) or ()}

    def _prefixed_dict(self, field: str) -> dict:
        return {f"{n}.{k}": v for n, m in self.items() for k, v in (getattr(m, field, None) or {}).items()}


def drop_plans(model: PreTrainedModel) -> None:
    """Takes a model's plans of tensor and expert parallelism away: they are of its layers as they were."""
    model._tp_plan = model._ep_plan = {}


def is_stateful(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Returns whether a model keeps recurrent states, which cannot go back: `generate` refuses drafts for it."""
    return model._is_stateful


def keeps_states_in_layers(model: type[PreTrainedModel]) -> bool:
    """Returns whether a model keeps recurrent states in its layers, where no cache holds them (RecurrentGemma)."""
    return hasattr(model, "_setup_cache")


def kept_in_float32(model: type[PreTrainedModel]) -> set[str]:
    """Returns the names of modules that loading keeps in float32, in bfloat16 models, too."""
    return set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


# ---- generation


class GenerationHooks:
    """Mixin before `GenerationMixin`, whose `generate` calls these. A subclass defines the methods with public names.

    - `goes_back`: Whether the cache can go back to before a rejected draft.
    - `arguments_of_drafts(model_kwargs)`: What a draft model of any kind reads, out of what the model is given.
    - `shorten_drafts(generator, model_kwargs)`: Bounds what a generator of drafts proposes, in place.
    """

    @property
    def _is_stateful(self) -> bool:
        return not self.goes_back

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer) -> dict:
        # a function in place of a decoding method is handed neither of these, even if it takes them
        both = {"streamer": streamer, "tokenizer": kwargs.get("tokenizer")}
        extracted = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        taken = inspect.signature(custom_generate).parameters if callable(custom_generate) else {}
        return extracted | {key: value for key, value in both.items() if key in taken and value is not None}

    def _get_candidate_generator(self, *, input_ids: Tensor, model_kwargs: dict, **kwargs):
        plain = self.arguments_of_drafts(model_kwargs)
        generator = super()._get_candidate_generator(input_ids=input_ids, model_kwargs=plain, **kwargs)
        self.shorten_drafts(generator, model_kwargs)
        return generator
