"""Loading, saving and resizing a fused model: what its backbone and its causal language model have in common."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint_ultrafuser import check_fused, refuse_other_specialists, refuse_quantised_head
from .compat_ultrafuser import CACHE, LoadingHooks, resized_head
from .configuration_ultrafuser import UltraFuserConfig
from .files_ultrafuser import HUB_OPTIONS, in_words
from .gate_base_ultrafuser import Gate
from .peft_ultrafuser import check_adapters


class UltraFuserPreTrainedModel(LoadingHooks, PreTrainedModel):
    """Base of the backbone and the causal language model."""

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
            loaded = super().from_pretrained(source, *args, **kwargs)
        if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) != "auto":
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            # the gate is not converted, and would keep all of its file in memory
            for parameter in model.base_model.fusion_gate.parameters():
                parameter.data = parameter.data.clone()
        return loaded

    def check_loaded(self, loading_info) -> None:
        """Rejects a checkpoint of other specialists, and a quantised head."""
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
        self.base_model.reader.resize_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = self.get_input_embeddings().weight.shape[0]
        head = self.get_output_embeddings()
        if isinstance(head, nn.Linear):
            trainable = head.weight.requires_grad
            self.set_output_embeddings(resized_head(self, head, rows, mean_resizing))
            self.get_output_embeddings().requires_grad_(trainable)
        self.base_model.resized |= rows != self.config.vocab_size
        self.config.vocab_size = self.vocab_size = self.base_model.vocab_size = rows
        return self.get_input_embeddings()
