"""Writes safetensors of a model whose tensors are made one after another."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor


MOST_BYTES = 10**9  # in one file, and so in memory


def write_tensors(
    header: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    folder: Path,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Writes tensors as `save_pretrained` does, in files of a gigabyte, each of which is in memory while it is made.

    Args:
        header: Type and shape of each, by name.
        make: Returns one by its name.
        folder: Folder to write to.
        done: Called after each.
    """
    empty = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in header.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=MOST_BYTES)
    for file, keys in split.filename_to_tensors.items():
        tensors = {}
        for key in keys:
            tensors[key] = make(key)
            done()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
