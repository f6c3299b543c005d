"""Findings about specialists that are to be fused."""

from dataclasses import dataclass, field

from modeling_ultrafuser.plan_base_ultrafuser import BLOCKS, FITS, WARNING, Finding

from .metadata import Source


@dataclass
class Judgement:
    """Verdict on whether specialists fit together, and what fusing them would take.

    Attributes:
        sources: What was read of each, by name; those that could not be read are missing.
        base: What was read of the base, where specialists are adapters of one.
        findings: In the order in which they were made.
        merges: Names of the weight merges that would be possible, too.
        no_merge: Why none would be, if none.
        numbers: As `estimates.estimate` returns; None if blocked.
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
