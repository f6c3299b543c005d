"""Checks what a specialist's architecture must have: a backbone with a key-value cache, and one linear head."""

import copy
import inspect

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from .causal_ultrafuser import check_causal_class
from .compat_ultrafuser import CACHE, keeps_states_in_layers
from .configuration_ultrafuser import UltraFuserConfig
from .files_ultrafuser import in_words
from .refusals_ultrafuser import Refusal


def check_architecture(name: str, config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    """Refuses what is no causal decoder with a key-value cache."""
    kind = f"{name!r} is a {config.model_type!r} model"
    suffixes = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
    saved_as = config.architectures or []
    if config.is_encoder_decoder or (saved_as and not any(a.endswith(suffixes) for a in saved_as)):
        raise Refusal(
            f"{kind} saved as {saved_as}, which is an encoder, an encoder-decoder, or a model without its head",
            "A specialist must be a decoder with a language-model head",
            "Use a causal language model.",
        )
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(text_config) not in MODEL_MAPPING:
        raise Refusal(
            f"{kind}, for which transformers has no causal language model",
            "A specialist must be a causal language model, or contain one as its text part",
            "Use one that `AutoModelForCausalLM` can load.",
        )
    if CACHE not in inspect.signature(backbone_class(text_config).forward).parameters:
        raise Refusal(
            f"{kind}, which keeps another kind of state",
            "A specialist must have attention layers with a key-value cache, because all specialists share one",
            "Use a transformer or a hybrid.",
        )
    unsaid = [field for field in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(text_config, field)]
    if unsaid:
        raise Refusal(
            f"{kind}, which does not say {unsaid}",
            "A specialist's configuration must say how many tokens it knows, how wide and how deep it is, "
            "because the fused model's follows from that",
            "Use another architecture.",
        )
    if keeps_states_in_layers(backbone_class(text_config)):
        raise Refusal(
            f"{kind}, which keeps recurrent states in its layers",
            "A specialist must keep all that it remembers of a text in a cache, because generation reorders and "
            "repeats that",
            "Use a transformer or a hybrid.",
        )
    check_causal_class(name, text_config, backbone_class(text_config))


def parts_of(name: str, model: PreTrainedModel, config: PreTrainedConfig) -> tuple[PreTrainedModel, nn.Module]:
    """A specialist's backbone, and its head, which must be one matrix on the backbone's last hidden state.

    Raises:
        ValueError: Naming the specialist and what it has instead.
    """
    kind, backbone_type = f"{name!r} ({type(model).__name__})", backbone_class(config)
    backbone = next((m for m in model.modules() if type(m) is backbone_type), None)
    head = model.get_output_embeddings()
    if backbone is None or head is None:
        raise Refusal(
            f"{kind} holds no {backbone_type.__name__} or no output embeddings",
            "A specialist must be a backbone followed by a linear head",
            "It cannot be fused.",
        )
    embedding, rows = backbone.get_input_embeddings().weight, backbone.config.vocab_size
    if embedding.shape[0] != rows:
        raise Refusal(
            f"the embedding of {kind} has {embedding.shape[0]} rows and its vocabulary {rows}",
            "A specialist must know as many tokens as it says, because rows beyond the common vocabulary are cut",
            "It cannot be fused.",
        )
    if getattr(head, "bias", None) is not None:
        raise Refusal(
            f"the head of {kind} has a bias",
            "A specialist's head must have no bias, because a bias could not be weighed by the gate inside one "
            "linear head",
            "If it is all zeros, set it to None before fusing.",
        )
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or weight is None or weight.shape[1] != config.hidden_size:
        raise Refusal(
            f"the head of {kind} is {head}",
            f"A specialist's head must be one matrix that reads its hidden state, {config.hidden_size} numbers, "
            "because the heads of all become one",
            "It cannot be fused.",
        )
    return backbone, head


def empty_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A specialist's model without any numbers."""
    with in_words(f"The configuration of {name!r}", config.name_or_path), torch.device("meta"):
        return auto_class(name, config).from_config(copy.deepcopy(config))


def empty_backbones(config: UltraFuserConfig) -> list[PreTrainedModel]:
    """The backbones of a fused model without any numbers."""
    backbones = []
    for name, c in zip(config.specialist_names, config.backbones, strict=False):
        with in_words(f"The configuration of {name!r}", c.name_or_path), torch.device("meta"):
            backbones.append(AutoModel.from_config(copy.deepcopy(c)))
    return backbones


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a specialist without its head."""
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def auto_class(name: str, config: PreTrainedConfig) -> type:
    """Returns the auto class that loads this checkpoint together with its head."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise Refusal(
        f"{name!r} is a {config.model_type!r} model, whose text part cannot be loaded on its own",
        "A specialist must be a causal language model, or read images beside text",
        "Load it and pass the model.",
    )
