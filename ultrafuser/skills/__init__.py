"""Instructions for coding agents that come with this package, in the form of Agent Skills."""

from pathlib import Path


def text() -> str:
    """Returns the content of `SKILL.md`."""
    return (Path(__file__).parent / "ultrafuser" / "SKILL.md").read_text(encoding="utf-8")
