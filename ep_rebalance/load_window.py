"""Load window: the recent snapshots of expert load, kept for the planner.

Letters: `A` phases, `L` MoE layers, `E` logical experts, `W` snapshots in the window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSample:
    """What one snapshot adds.

    counts_ALE: int64 [A, L, E], tokens per logical expert summed over all ranks, `A` in the order
        of PHASES; a token counts once for each expert it was routed to.
    steps: engine steps that the snapshot sums up.
    step_seconds: mean wall time of one of them.
    """

    counts_ALE: NDArray[np.int64]
    steps: int
    step_seconds: float

    def __post_init__(self) -> None:
        if self.counts_ALE.ndim != 3 or self.counts_ALE.shape[0] != len(PHASES):
            raise ValueError(
                f"counts must be [{len(PHASES)} phases, layers, experts], got {self.counts_ALE.shape}"
            )


class LoadWindow:
    """The last `snapshots` snapshots that carried tokens; idle ones say nothing and are not kept."""

    def __init__(self, snapshots: int) -> None:
        if snapshots < 1:
            raise ValueError(f"a window must keep at least one snapshot, got snapshots={snapshots}")
        self._samples: deque[LoadSample] = deque(maxlen=snapshots)

    def __len__(self) -> int:
        return len(self._samples)

    def append(self, sample: LoadSample) -> None:
        """Add the newest snapshot, dropping the oldest if full.

        Raises ValueError if its layers or experts differ from those already in the window.
        """
        if self._samples and self._samples[0].counts_ALE.shape != sample.counts_ALE.shape:
            raise ValueError(
                f"snapshot of shape {sample.counts_ALE.shape} does not fit a window of "
                f"{self._samples[0].counts_ALE.shape}"
            )
        if sample.counts_ALE.any():
            self._samples.append(sample)

    def clear(self) -> None:
        self._samples.clear()

    def samples_WLE(self) -> NDArray[np.float64]:
        """float64 [W, L, E], tokens per logical expert in each snapshot, phases summed, oldest
        first.

        Raises ValueError on an empty window, whose layers and experts are unknown.
        """
        self._require_samples()
        counts_WLE = [sample.counts_ALE.sum(axis=0) for sample in self._samples]
        return np.stack(counts_WLE).astype(np.float64)

    def load_LE(self) -> NDArray[np.int64]:
        """int64 [L, E], tokens per logical expert in the whole window. Raises ValueError if it is
        empty.
        """
        self._require_samples()
        load_LE = np.zeros(self._samples[0].counts_ALE.shape[1:], dtype=np.int64)
        for sample in self._samples:
            load_LE += sample.counts_ALE.sum(axis=0)
        return load_LE

    @property
    def tokens(self) -> int:
        """Tokens that the busiest layer routed, each counted once for each of its experts."""
        return int(self.load_LE().sum(axis=1).max()) if self._samples else 0

    @property
    def step_seconds(self) -> float:
        """Mean wall time of an engine step in the window; 0 while it is empty."""
        steps = sum(sample.steps for sample in self._samples)
        seconds = sum(sample.steps * sample.step_seconds for sample in self._samples)
        return seconds / steps if steps else 0.0

    def _require_samples(self) -> None:
        if not self._samples:
            raise ValueError("the load window holds no snapshot with tokens yet")
