"""Fuse several specialist causal language models into one, token by token.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoModelForSequenceClassification`
know fused models, and makes `save_pretrained` copy these files into the saved folder, so that it loads where this package is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_ultrafuser import UltraFuserConfig
from .modeling_ultrafuser import UltraFuserForCausalLM, UltraFuserForSequenceClassification, UltraFuserModel
from .tokenizer_ultrafuser import common_tokenizer


AutoConfig.register("ultrafuser", UltraFuserConfig, exist_ok=True)
AutoModel.register(UltraFuserConfig, UltraFuserModel, exist_ok=True)
AutoModelForCausalLM.register(UltraFuserConfig, UltraFuserForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(UltraFuserConfig, UltraFuserForSequenceClassification, exist_ok=True)
UltraFuserConfig.register_for_auto_class()
UltraFuserModel.register_for_auto_class("AutoModel")
UltraFuserForCausalLM.register_for_auto_class("AutoModelForCausalLM")
UltraFuserForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "UltraFuserConfig",
    "UltraFuserForCausalLM",
    "UltraFuserForSequenceClassification",
    "UltraFuserModel",
    "common_tokenizer",
]
