"""Finds the recipe that a command line means: specialists by name, a recipe file, or a reference."""

from pathlib import Path

from .fusion_recipe import Fusion, FusionRecipe
from .reference import ReferenceRecipe


def read_recipe(specialists: dict[str, str] | Path) -> FusionRecipe | ReferenceRecipe:
    """Returns what to build.

    Args:
        specialists: Name to Hub id or folder; or a YAML file, a recipe for fusing or a reference.

    Raises:
        ValueError: If the file holds neither, or is damaged.
        OSError: If it cannot be read.
    """
    if isinstance(specialists, dict):
        return FusionRecipe(Fusion(specialists))
    return ReferenceRecipe.read(specialists) or FusionRecipe.read(specialists)
