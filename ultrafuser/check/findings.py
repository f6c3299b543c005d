"""What was found about specialists that are to be fused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .metadata import Source


FITS, WARNING, BLOCKS = "fits", "warning", "blocks"


@dataclass
class Finding:
    """One thing that was looked at.

    Attributes:
        about: What was looked at, in a word or two.
        status: "fits", "warning" or "blocks".
        text: What was found.
        fix: What to do about it, if anything can be.
    """

    about: str
    status: str
    text: str
    fix: str = ""


@dataclass
class Judgement:
    """Whether specialists fit together, and what fusing them would take.

    Attributes:
        sources: What was read of each, by name; those that could not be read are missing.
        base: What was read of the base, where specialists are adapters of one.
        findings: In the order in which they were made.
        merges: Names of the weight merges that would be possible, too.
        no_merge: Why none would be, if none.
        numbers: As `estimating.estimate` returns; None if blocked.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    base: Source | None = None
    findings: list[Finding] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    no_merge: str | None = None
    numbers: dict | None = None

    @property
    def verdict(self) -> str:
        """The worst status of all."""
        return max((f.status for f in self.findings), key=[FITS, WARNING, BLOCKS].index, default=FITS)

    def note(self, about: str, status: str, text: str, fix: str = "") -> None:
        """Adds a finding."""
        self.findings.append(Finding(about, status, text, fix))

    @contextmanager
    def refusals(self, about: str, status: str = BLOCKS, fix: str | None = None) -> Iterator[None]:
        """Turns what refuses inside into a finding: its first sentence, and its way out as the fix."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            text, _, way_out = str(error).partition(". ")
            self.note(about, status, text.removesuffix(".") + ".", way_out if fix is None else fix)


def each(values: dict) -> str:
    """A value for each specialist, in words."""
    return ", ".join(f"{name} {value}" for name, value in values.items())
