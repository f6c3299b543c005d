"""What this project relies on of transformers' private parts. No test here runs our code."""

import inspect
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaModel,
)
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import cached_file

from modeling_ultrafuser.compat_ultrafuser import forget_last
from tests.support.llamas import IDS, config, llama


class Pair(PreTrainedConfig):
    """Two models in one."""

    model_type = "pair_of_a_contract"
    sub_configs = {"one": LlamaConfig, "other": LlamaConfig}

    def __init__(self, **kwargs):
        self.one, self.other = config(), config()
        self.vocab_size = self.hidden_size = self.num_attention_heads = 8
        super().__init__(**kwargs)

    @property
    def per_layer_config(self):
        return [*self.one.per_layer_config, *self.other.per_layer_config]

    @property
    def kv_sharing_modes(self):
        return [None, None, None, "reuse"]


# ---- loading


class Watched(LlamaForCausalLM):
    """Notes what loading says, and takes it back."""

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self.missing, self.unexpected = set(loading_info.missing_keys), set(loading_info.unexpected_keys)
        self.devices = {parameter.device.type for parameter in self.parameters()}
        mismatched = list(loading_info.mismatched_keys)
        for keys in (loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys):
            keys.clear()
        if mismatched:
            raise ValueError(f"in our words: {mismatched[0][0]}")


def load(kind, state, **kwargs):
    return kind.from_pretrained(None, config=config(), state_dict=state, **kwargs)


def test_transformers_calls_adjust_missing_keys_after_loading_and_before_it_reports():
    state = llama().state_dict()
    state["extra"] = state.pop("model.norm.weight")
    model, info = load(Watched, state, output_loading_info=True)
    assert model.missing == {"model.norm.weight"}
    assert model.unexpected == {"extra"}
    assert model.devices == {"cpu"}
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_an_error_raised_then_is_what_the_caller_sees_once_the_loading_info_is_empty():
    state = llama().state_dict()
    state["lm_head.weight"] = state["lm_head.weight"][:, :4].clone()
    with pytest.raises(ValueError, match=r"^in our words: lm_head\.weight$"):
        load(Watched, state)


class Scaled(LlamaForCausalLM):
    """Has a part without tensors, and notes which parts are initialised."""

    def __init__(self, config):
        super().__init__(config)
        self.part = nn.Identity()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Identity):
            module.filled = True


class OfTheLibrary(Scaled):
    @classmethod
    def is_custom_code(cls):
        return False


def test_loading_initialises_modules_without_tensors_unless_is_custom_code_is_true():
    state = llama().state_dict()
    assert Scaled.is_custom_code()
    assert not hasattr(load(Scaled, state).part, "filled")
    assert load(OfTheLibrary, state).part.filled


def test_loading_builds_the_model_within_get_init_context():
    events = []

    @contextmanager
    def noted():
        events.append("enter")
        yield
        events.append("leave")

    class Contexts(LlamaForCausalLM):
        @classmethod
        def get_init_context(cls, *args, **kwargs):
            return [*super().get_init_context(*args, **kwargs), noted()]

        def __init__(self, config):
            super().__init__(config)
            events.append("build")

    load(Contexts, llama().state_dict())
    assert events == ["enter", "build", "leave"]


def test_no_init_weights_draws_no_numbers_while_a_model_is_built():
    drawn = []

    class Drawn(LlamaForCausalLM):
        def _init_weights(self, module):
            drawn.append(module)

    with init.no_init_weights():
        Drawn(config())
    assert not drawn
    Drawn(config())
    assert drawn


def test_keep_in_fp32_modules_strict_names_modules_that_stay_in_float32_in_bfloat16():
    class Kept(LlamaForCausalLM):
        _keep_in_fp32_modules_strict = ["lm_head"]

    model = load(Kept, llama().state_dict(), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_cached_file_returns_none_for_an_absent_file_when_told_not_to_raise(tmp_path):
    assert cached_file(tmp_path, "absent.json", _raise_exceptions_for_missing_entries=False) is None
    with pytest.raises(OSError, match="absent"):
        cached_file(tmp_path, "absent.json")


def test_get_resized_lm_head_returns_a_head_that_begins_with_the_old_rows():
    model = llama()
    before = model.lm_head.weight.clone()
    head = model._get_resized_lm_head(model.lm_head, 13, mean_resizing=True)
    assert head.weight.shape == (13, 8)
    torch.testing.assert_close(head.weight[:11], before)


def test_a_model_is_remote_code_where_its_auto_class_is_set():
    class Registered(LlamaForCausalLM):
        _auto_class = "AutoModelForCausalLM"

    class NotAnyMore(Registered):
        _auto_class = None

    assert Registered.is_remote_code()
    assert not NotAnyMore.is_remote_code()


# ---- classes


COLLECTED = ("_no_split_modules", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
COLLECTED += ("_skip_keys_device_placement", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing")


def test_post_init_collects_what_direct_children_say_by_attribute_name():
    class Parts(nn.ModuleDict):
        _keys_to_ignore_on_save = {"b.kept"}
        _tp_plan = {"b.c": "colwise"}
        _ep_plan = {"b.d": "grouped_gemm"}
        _fsdp_plan = {"b.e": "free_full_weight"}
        all_tied_weights_keys = {"b.weight": "c.weight"}

    for name in COLLECTED:
        setattr(Parts, name, {f"{name}_of_a_part"})

    class Whole(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.parts = Parts({"b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
            self.post_init()

    model = Whole(config())
    for name in COLLECTED:
        assert f"{name}_of_a_part" in getattr(model, name)
    assert model._keys_to_ignore_on_save == {"parts.b.kept"}
    assert model.all_tied_weights_keys == {"parts.b.weight": "parts.c.weight"}
    for name, entry in (("_tp_plan", "parts.b.c"), ("_ep_plan", "parts.b.d"), ("_fsdp_plan", "parts.b.e")):
        assert entry in getattr(model, name)


def test_recurrent_gemma_keeps_its_states_in_layers_and_has_setup_cache():
    assert hasattr(RecurrentGemmaModel, "_setup_cache")
    assert not hasattr(LlamaModel, "_setup_cache")


def test_sequence_classification_reads_the_last_token_of_a_backbone_called_model_by_a_layer_called_score():
    model = llama(LlamaForSequenceClassification)
    with torch.no_grad():
        states = model.model(IDS).last_hidden_state
        torch.testing.assert_close(model(IDS).logits, model.score(states[:, -1]))


# ---- configurations and attention


def test_a_dict_of_attention_names_sets_each_part_and_a_string_sets_all():
    pair = Pair()
    pair._attn_implementation = {"": "eager", "one": "sdpa", "other": "flex_attention"}
    assert [c._attn_implementation for c in (pair, pair.one, pair.other)] == ["eager", "sdpa", "flex_attention"]
    pair._attn_implementation = "sdpa"
    assert [c._attn_implementation for c in (pair, pair.one, pair.other)] == ["sdpa"] * 3


def test_attention_functions_are_looked_up_by_name_and_eager_is_the_default_given():
    default = object()
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", default) is default
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", default) is ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_attention_that_comes_with_transformers_is_of_a_module_of_transformers():
    names = {"sdpa", "flash_attention_2", "flex_attention"}
    assert names <= set(ALL_ATTENTION_FUNCTIONS.keys())
    assert all(ALL_ATTENTION_FUNCTIONS.get(name).__module__.startswith("transformers.") for name in names)
    assert ALL_ATTENTION_FUNCTIONS.get("eager") is None


def test_llama_attends_eagerly_with_a_module_that_has_groups_and_training_alone():
    module = nn.Module().eval()
    module.num_key_value_groups = 2
    queries, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    output, _ = eager_attention_forward(module, queries, keys, keys, None, scaling=0.5)
    wide = keys.repeat_interleave(2, 1)
    expected = (0.5 * queries @ wide.mT).softmax(-1) @ wide
    torch.testing.assert_close(output, expected.transpose(1, 2))


# ---- caches


def test_the_cache_has_one_name_as_an_argument_and_in_outputs():
    names = {"cache", "past_key_values"}
    (name,) = names & {field.name for field in fields(BaseModelOutputWithPast)}
    assert names & set(inspect.signature(LlamaModel.forward).parameters) == {name}
    assert name in llama()(IDS, use_cache=True)


def test_a_cache_holds_layers_and_two_settings_and_nothing_else():
    assert set(vars(DynamicCache())) == {"layers", "layer_class_to_replicate", "offloading"}


def test_a_cache_adds_layers_as_they_come_only_where_it_has_a_class_to_replicate():
    states = torch.zeros(1, 2, 3, 4)
    cache = DynamicCache()
    assert not cache.layers
    cache.update(states, states, 1)
    assert len(cache.layers) == 2
    cache.layer_class_to_replicate = None
    with pytest.raises(IndexError):
        cache.update(states, states, 2)


def test_a_cache_is_laid_out_by_per_layer_config_without_what_kv_sharing_modes_reuse():
    assert DynamicCache(config=Pair()).is_dummy == [False, False, False, True]


def test_a_window_keeps_what_a_crop_needs_once_past_recording_is_active():
    states = torch.zeros(1, 2, 6, 4)
    cache = DynamicCache(config=config(sliding_window=2, layer_types=["sliding_attention"] * 2))
    cache.activate_past_recording()
    for layer in range(2):
        cache.update(states, states, layer)
    cache.crop(-3)
    assert cache.get_seq_length() == 3


def test_keys_that_are_cut_off_by_hand_are_forgotten_where_layers_slide_and_where_they_do_not():
    states = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 4)
    caches = []
    for texts in ((states[:, :, :3], -states[:, :, 3:6], states[:, :, 3:]), (states,)):
        types = ["sliding_attention", "full_attention"]
        cache = DynamicCache(config=config(sliding_window=3, layer_types=types))
        cache.activate_past_recording()
        for number, text in enumerate(texts):
            for layer in range(2):
                cache.update(text, text, layer)
            if number == 1:
                forget_last(cache, 3)
        caches.append(cache)
    forgot, never = caches
    assert [layer.get_seq_length() for layer in forgot.layers] == [8, 8]
    for one, other in zip(forgot.layers, never.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    # a window goes back once more
    forgot.crop(-2)
    assert torch.equal(forgot.layers[0].keys, states[:, :, 4:6])


def test_the_paged_cache_is_known_by_class_and_needs_no_init_to_be_updated():
    class Record(PagedAttentionCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            self.seen = layer_idx
            return key_states, value_states

        def __del__(self):
            pass

    record = object.__new__(Record)
    backbone = LlamaModel._from_config(config(), attn_implementation="sdpa").eval()
    backbone(IDS, cache=record, use_cache=False, attention_mask=torch.zeros(1, 1, 5, 5), max_length_k=5)
    assert record.seen == 1
