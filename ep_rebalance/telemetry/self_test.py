"""What came of the trials of moves at start, for the status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What came of the trials at start.

    verdicts: MoE layers by the verdict on their kind, in lower case; empty if nothing was tried.
    seconds: that finding, comparing and trying took.
    """

    verdicts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


NOT_TRIED = SelfTest()
