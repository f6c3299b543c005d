"""One colour per specialist or domain, the same in every picture, on the page and in the terminal."""

from collections.abc import Iterable


# each has a contrast of 3:1 or more with white and with the dark paper, and any two stay apart (28 or more in CIELAB)
# for readers with protanopia, deuteranopia or tritanopia too
PALETTE = ("#3d4ff2", "#cc7a00", "#11a679", "#cc1439", "#9e77d9", "#8c4d80")
INK = {"light": "#1f2328", "dark": "#e6edf3"}
PAPER = {"light": "#ffffff", "dark": "#0d1117"}


def assign(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in their order; with more names than colours they repeat."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def strength(weight: float, specialists: int) -> float:
    """Returns the strength of a specialist's colour: from 0.1, when weights are equal, to 0.5, when it has all of it."""
    even, size = 1 / specialists, min(abs(weight), 1.0)
    return 0.1 + 0.4 * max(0.0, size - even) / (1 - even)


def css(colour: str, weight: float, specialists: int) -> str:
    """Returns the style by which a page shows that a specialist of this colour leads with this weight."""
    return f"background:{colour}{round(255 * strength(weight, specialists)):02x};border-color:{colour}"


def blend(colour: str, share: float, paper: str = PAPER["light"]) -> str:
    """A colour laid over paper with this opacity."""
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(paper[1:]), strict=True)
    return "#" + "".join(f"{round(share * c + (1 - share) * p):02x}" for c, p in pairs)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, from 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def text_on(colour: str) -> str:
    """Almost black or almost white, whichever reads better on a colour.

    Not quite, because pure black and the paper's white are what `plots.save` makes follow the surroundings.
    """
    return max("#010101", "#fefefe", key=lambda text: contrast(text, colour))


def _luminance(colour: str) -> float:
    channels = [byte / 255 for byte in bytes.fromhex(colour[1:])]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
