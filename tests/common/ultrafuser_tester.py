"""What transformers' common tests need to know about the models that they run on. Run it with `check_common.py`."""

import json
import unittest

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, UltraFuserModel

from . import test_fsdp_mixin, test_tensor_parallel_mixin
from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_fsdp_mixin import FSDPTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin


# by these names the tests tell which class is a backbone and which takes labels
MODEL_MAPPING_NAMES["ultrafuser"] = "UltraFuserModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ultrafuser"] = "UltraFuserForCausalLM"
# the tests that start several processes run for a few families only, unless asked for all
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def backbone(config_class=LlamaConfig, **fields):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return config_class(**sizes | heads | TOKENS | fields)


class LlamaTester:
    """The control."""

    base_model_class, causal_lm_class, config_class = LlamaModel, LlamaForCausalLM, LlamaConfig
    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return backbone(num_hidden_layers=2)

    def config_fields(self):
        return {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], 99)
        attention_mask = torch.tril(torch.ones_like(input_ids).to(torch_device))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class TwoLlamasTester(LlamaTester):
    """Two specialists of one layer each: the tests want two layers, and an entry more for the embeddings of each."""

    base_model_class, causal_lm_class, config_class = UltraFuserModel, UltraFuserForCausalLM, UltraFuserConfig
    # two for each specialist, and what the head reads
    expected_num_hidden_layers = 5

    def specialists(self):
        return [backbone(), backbone(intermediate_size=41)]

    def get_config(self):
        return UltraFuserConfig(**self.config_fields())

    def config_fields(self):
        config = UltraFuserConfig(specialist_names=["text", "code"], specialists=self.specialists())
        # as they stand in config.json: the tests want back what they gave
        specialists = json.loads(config.to_json_string())["specialists"]
        return {"specialist_names": ["text", "code"], "specialists": specialists, **TOKENS}


class MixedPairTester(TwoLlamasTester):
    """Two families of different width."""

    def specialists(self):
        return [backbone(), backbone(Qwen2Config, hidden_size=48)]


class CommonTests(
    ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin, GenerationTesterMixin
):
    made_by = None
    model_tester = None

    def setUp(self):
        self.model_tester = self.made_by(self)
        properties = ["hidden_size", "num_attention_heads", "num_hidden_layers"]
        fields = self.model_tester.config_fields()
        self.config_tester = ConfigTester(self, self.made_by.config_class, common_properties=properties, **fields)

    @property
    def all_model_classes(self):
        return self.made_by.base_model_class, self.made_by.causal_lm_class


def add_config_tests():
    """One test for each check of `ConfigTester`, so that each can pass or fail on its own."""
    for name in dir(ConfigTester):
        if name.startswith(("create_and_test_", "check_")):
            test = "test_" + name.removeprefix("create_and_test_").removeprefix("check_")
            setattr(CommonTests, test, lambda self, name=name: getattr(self.config_tester, name)())


add_config_tests()


class CompositeTests(CommonTests):
    _is_composite = True

    def _has_tp_plan(self):
        # the tests look for one in the configuration; here it comes from the specialists
        return True

    def _get_tiny_config(self):
        # the tests write sizes into the configuration; here they follow from the specialists
        config = self.model_tester.get_config()
        return type(config), config.to_diff_dict()


class LlamaTest(CommonTests, unittest.TestCase):
    made_by = LlamaTester


class TwoLlamasTest(CompositeTests, unittest.TestCase):
    made_by = TwoLlamasTester


class MixedPairTest(CompositeTests, unittest.TestCase):
    made_by = MixedPairTester
