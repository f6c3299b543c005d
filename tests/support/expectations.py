"""What a damaged file may still mean: what its bytes say."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import tests.conftest  # noqa: F401


class Other(Exception):
    """Another model than the files say."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """What is in a folder's files, read without the code under test."""
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def expect_files(model, folder: Path, scratch: Path) -> None:
    """Refuses a model that does not hold what its folder holds; saving it writes the names that the files have."""
    with tempfile.TemporaryDirectory(dir=scratch) as again:
        model.save_pretrained(again)
        ours, theirs = tensors_of(Path(again)), tensors_of(folder)
    if ours.keys() != theirs.keys():
        raise Other(f"names differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    if odd := [k for k in ours if not same(ours[k], theirs[k])]:
        raise Other(f"{odd[0]} differs")


def expect_specialist(model, name: str, folder: Path) -> None:
    """The same of a specialist of a fused model, up to rows that were cut and the untied head."""
    theirs = tensors_of(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as again:
        model.specialist(name).save_pretrained(again)
        ours = tensors_of(Path(again))
    if left := [k for k in theirs.keys() - ours.keys() if not k.endswith("rotary_emb.inv_freq")]:
        raise Other(f"{left[0]} is not used")
    tied = {"lm_head.weight", "embed_out.weight"}
    if made_up := [
        k
        for k in ours.keys() - theirs.keys()
        if k not in tied
        or "true" not in json.dumps(json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"))
    ]:
        raise Other(f"{made_up[0]} is made up")
    for key, tensor in ours.items():
        if key in theirs and not same(tensor, theirs[key][: len(tensor)] if tensor.ndim else theirs[key]):
            raise Other(f"{key} differs")
