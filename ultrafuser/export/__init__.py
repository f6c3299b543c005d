"""Layouts of stock mixtures of experts that a fused model's specialists can be written in."""

from .layout_base import Layout
from .layout_mixtral import MixtralLayout
from .layout_qwen2_moe import Qwen2MoeLayout


LAYOUTS: dict[str, type[Layout]] = {
    "mixtral": MixtralLayout,
    "qwen2_moe": Qwen2MoeLayout,
}


def layout_of(name: str) -> Layout:
    """Returns a layout by its name.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout {name!r:.100}. Choose one of {sorted(LAYOUTS)}.")
    return LAYOUTS[name]()
