"""What this project relies on of vLLM's Transformers backend. Without vLLM these tests are skipped."""

import inspect

import pytest
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


base = pytest.importorskip("vllm.model_executor.models.transformers.base")
attention = pytest.importorskip("vllm.model_executor.models.transformers.fusers.attention")


class Layer(nn.Module):
    """Attends, in the two lines that vLLM looks for."""

    scaling = 0.5

    def __init__(self):
        super().__init__()
        self.config, self.layer_idx = LlamaConfig(), 7
        self.config._attn_implementation = "vllm"

    def forward(self, query, key, value):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return attend(self, query, key, value, None, scaling=self.scaling)[0]


class Hidden(Layer):
    """Looks its attention up elsewhere."""

    def forward(self, query, key, value):
        return self.attend(query, key, value)


def test_vllm_finds_layers_by_two_lines_of_their_source_and_scaling_by_its_name():
    fuser = attention.AttentionFuser.match(None, Layer())
    assert fuser.scale(Layer()) == 0.5
    assert attention.AttentionFuser.match(None, Hidden()) is None


def test_vllm_calls_its_attention_vllm_and_numbers_layers_by_layer_idx():
    layer = Layer()
    fuser = attention.AttentionFuser.match(None, layer)
    assert fuser.validate(layer, None)
    assert fuser.layer_index(layer) == 7
    layer.config._attn_implementation = "sdpa"
    assert not fuser.validate(layer, None)


def test_vllm_calls_its_attention_vllm_before_it_builds_the_model():
    build = inspect.getsource(base.Base.__init__)
    assert attention.VLLM_ATTN_IMPL == "vllm"
    assert build.index("self._patch_config()") < build.index("AutoModel.from_config(")


def test_vllm_puts_an_attn_on_each_layer_that_knows_the_type_of_its_cache():
    from vllm.model_executor.layers.attention import Attention

    assert base.VLLM_ATTN_ATTR == "attn"
    assert "self.kv_cache_torch_dtype = " in inspect.getsource(Attention.__init__)
