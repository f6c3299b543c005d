"""What this project relies on of PEFT beyond its documents. No test here runs our code."""

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.merge_utils import dare_linear, task_arithmetic, ties
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


CONFIG = LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def adapted(kind=LlamaForCausalLM, **settings):
    return get_peft_model(kind(CONFIG), LoraConfig(**{**LORA, **settings}))


class Noted(LlamaForCausalLM):
    """Notes what is on the model whenever somebody looks through its modules."""

    def named_modules(self, *args, **kwargs):
        self.__dict__.setdefault("noted", []).append(list(self.__dict__.get("peft_config", ())))
        return super().named_modules(*args, **kwargs)


def test_peft_sets_peft_config_on_a_model_and_then_looks_through_its_modules():
    model = adapted(Noted)
    inner = model.get_base_model()
    assert ["default"] in inner.noted
    inner.noted.clear()
    model.add_adapter("other", LoraConfig(**LORA))
    assert ["default", "other"] in inner.noted


def test_an_adapter_s_file_lacks_tensors_with_another_adapter_s_name_in_their_path():
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("q_proj", LoraConfig(**LORA))
    kept = get_peft_model_state_dict(model, adapter_name="default")
    assert not [name for name in kept if "q_proj" in name]


def test_an_adapted_layer_has_a_base_layer_and_a_saved_module_a_copy_called_modules_to_save_default():
    model = adapted(target_modules=["lm_head"])
    assert isinstance(model.get_base_model().lm_head.base_layer, nn.Linear)
    names = [name for name, _ in adapted(modules_to_save=["lm_head"]).named_parameters()]
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names


def test_a_list_of_trainable_tokens_is_of_embed_tokens_and_wraps_it_with_a_token_adapter():
    model = adapted(trainable_token_indices=[3])
    assert hasattr(model.get_base_model().model.embed_tokens, "token_adapter")


def test_prompt_tuning_asks_for_embeddings_under_one_name_first():
    class Asked(LlamaForCausalLM):
        def get_submodule(self, target):
            if target == "embeddings.word_embeddings":
                return self.model.embed_tokens
            return super().get_submodule(target)

    model = get_peft_model(Asked(CONFIG), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert model.word_embeddings is model.base_model.model.embed_tokens


def test_generating_with_a_prefix_peft_prepares_inputs_in_place_of_the_model_and_puts_that_back():
    owners = []
    model = get_peft_model(LlamaForCausalLM(CONFIG), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.base_model.register_forward_pre_hook(lambda m, _: owners.append(m.prepare_inputs_for_generation.__self__))
    model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=1)
    assert owners[0] is model
    assert model.base_model.prepare_inputs_for_generation.__self__ is model.base_model


def test_merges_take_changes_weights_and_a_density():
    changes, weights = [torch.tensor([4.0, -1.0]), torch.tensor([2.0, 3.0])], torch.tensor([0.5, 1.0])
    torch.testing.assert_close(task_arithmetic(changes, weights), torch.tensor([4.0, 2.5]))
    torch.testing.assert_close(dare_linear(changes, weights, 1.0), torch.tensor([4.0, 2.5]))
    # the sign of the larger sum is elected, and those that agree are averaged
    merged = ties(changes, torch.ones(2), 1.0)
    torch.testing.assert_close(merged, torch.tensor([3.0, 3.0]))
