"""Names of specialists, which become names of modules and of configuration fields."""

import keyword
import re

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig


# words that transformers looks up on every configuration, or that other code would take for a part of the model
RESERVED_NAMES = {
    *("decoder", "encoder", "generator", "text_config", "text_encoder", "audio_encoder", "vision_config"),
    *("lm_head", "model", "gate", "fusion_gate", "specialists"),
    *("auto_map", "attn_implementation", "quantization_config"),
    *dir(nn.ModuleDict()),
    "smart_apply",  # which transformers gives to every module once it has built a model
    *vars(GenerationConfig()),  # which a saved configuration must not have
    # read and checked on any configuration
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "mlp_layer_types", "mtp_layer_types"),
    *("shared", "default_theta"),
}


def validate_specialist_names(names: list[str], config_class: type[PreTrainedConfig]) -> None:
    """Rejects names that cannot be module names, or that other code would take for something else.

    Args:
        names: Of the specialists.
        config_class: Class of the fused model's configuration, whose fields are taken.

    Raises:
        ValueError: Naming the first unusable name and what a usable one looks like.
    """
    written = (PreTrainedConfig.__annotations__, config_class.__annotations__, config_class._DERIVED)
    taken = RESERVED_NAMES.union(*written)
    for name in names:
        usable = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is not None
        if not usable or keyword.iskeyword(name) or name in taken or hasattr(config_class, name):
            raise _unusable(name)
    duplicates = sorted({n for n in names if names.count(n) > 1})
    if duplicates:
        raise ValueError(f"Every specialist needs a name of its own, but {duplicates} came more than once in {names}.")


def refuse_ambiguous_names(names: list[str], configs: list[PreTrainedConfig], path_parts: set[str]) -> None:
    """Refuses names for a new fused model that folders which exist may have, but that other code misreads.

    Args:
        names: Of the specialists.
        configs: Theirs, whose fields code for any model may look up.
        path_parts: Words in the paths of their modules, by which PEFT and quantisers find them.

    Raises:
        ValueError: Naming the first such name and what a usable one looks like.
    """
    taken = path_parts.union(*(c.to_dict() for c in configs), *(c.attribute_map for c in configs))
    for name in names:
        # adapters are told by the first in a path, and PEFT calls adapters by the others
        if name in taken or "lora_" in name or name in ("default", "ref"):
            raise _unusable(name)


def _unusable(name: str) -> ValueError:
    usable_word = re.sub(r"\W+", "_", f"model_{name}", flags=re.ASCII).replace("lora_", "lora")
    return ValueError(
        f"A specialist's name becomes the name of a module and of a configuration field, so it must be a word "
        f"of letters, digits and underscores that starts with a letter and has no other meaning there, but "
        f"got {name!r}. Try {usable_word!r} or, say, 'text', 'code', 'math'."
    )
