"""Loading, saving and resizing a fused model: what its backbone and its causal language model have in common."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .checkpoint_ultrafuser import check_fused
from .configuration_ultrafuser import UltraFuserConfig
from .files_ultrafuser import HUB_OPTIONS, in_words
from .gate_base_ultrafuser import Gate
from .loaded_ultrafuser import refuse_other_specialists, refuse_quantised_head
from .peft_ultrafuser import check_adapters
from .versions_ultrafuser import CACHE


class UltraFuserPreTrainedModel(PreTrainedModel):
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

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that loading fills whatever a saved folder does not hold as it does for the library's own models.

        In other people's code it passes over modules without tensors of their own, backbones among them: the buffers
        that Falcon-H1 fills there, for one, would be left as whatever was in memory.
        """
        return False

    @classmethod
    def get_init_context(cls, *args, **kwargs) -> list:
        """Like the library's, without drawing numbers for tensors that are loaded right after."""
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

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
            return super().from_pretrained(source, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # the library's last step before it reports, with a table of shapes or a mere warning
        super()._adjust_missing_and_unexpected_keys(loading_info)
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
        for specialist in self.base_model.specialists.values():
            specialist.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = self.get_input_embeddings().weight.shape[0]
        head = self.get_output_embeddings()
        if isinstance(head, nn.Linear):
            trainable = head.weight.requires_grad
            self.set_output_embeddings(self._get_resized_lm_head(head, rows, mean_resizing=mean_resizing))
            self.get_output_embeddings().requires_grad_(trainable)
        self.base_model.resized |= rows != self.config.vocab_size
        self.config.vocab_size = self.vocab_size = self.base_model.vocab_size = rows
        return self.get_input_embeddings()
