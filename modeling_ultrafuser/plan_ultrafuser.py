"""Checks of what is to be fused, before any weight is loaded."""

import json
import tempfile

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)

from .architecture_ultrafuser import empty_backbones
from .configuration_ultrafuser import UltraFuserConfig
from .names_ultrafuser import refuse_ambiguous_names


DTYPE_RULE = (
    "All specialists of a fused model have one dtype, because one head multiplies all their hidden states, but they "
    "are {}. Choose one: dtype=torch.bfloat16, say."
)


def common_dtype(specialists: dict, configs: dict[str, PreTrainedConfig]) -> torch.dtype | None:
    """The dtype that all specialists share, None if none writes one down, or a refusal."""
    dtypes = {n: as_dtype(c.dtype or c.get_text_config(decoder=True).dtype) for n, c in configs.items()}
    # a model in memory may have been cast since its configuration was written
    dtypes |= {n: s.dtype for n, s in specialists.items() if isinstance(s, PreTrainedModel)}
    if len(set(dtypes.values()) - {None}) > 1:
        raise ValueError(DTYPE_RULE.format(dtypes))
    return next((d for d in dtypes.values() if d is not None), None)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`dtype` must be 'auto' or a floating point type such as torch.bfloat16, but got {dtype!r}.")
    return found


def check_names(config: UltraFuserConfig) -> None:
    """Refuses names of specialists that are words in the paths of their modules, or fields of their configurations."""
    parts = {part for b in empty_backbones(config) for path, _ in b.named_parameters() for part in path.split(".")}
    refuse_ambiguous_names(config.specialist_names, config.backbones, parts)


def check_saving(config: UltraFuserConfig) -> None:
    """Refuses specialists whose configuration does not survive being saved as a part of the fused model's.

    Raises:
        ValueError: Naming the first such specialist, or the whole, and what happened.
    """
    parts = dict(zip(config.specialist_names, config.specialists, strict=True)) | {"the fused model": config}
    for name, part in parts.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
                read = type(part).from_pretrained(folder)
            written, back = _plain(part), _plain(read)
            lost = [key for key, value in written.items() if back.get(key) != value]
        except Exception as error:
            raise ValueError(
                f"A fused model is saved with the configuration of every specialist, but that of {name!r} "
                f"({part.model_type!r}) cannot be: {type(error).__name__}: {' '.join(str(error).split())} Correct its "
                f"config.json, or fuse a model of another family."
            ) from error
        if lost:
            raise ValueError(
                f"A fused model is saved with the configuration of every specialist, but {lost} of {name!r} "
                f"({part.model_type!r}) are read back as something else. Correct its config.json, or fuse a model of "
                f"another family."
            )


def _plain(config: PreTrainedConfig) -> dict:
    """What a configuration says, as its file would."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k not in _OF_THE_FILE}


# what saving itself writes
_OF_THE_FILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "auto_map")
