"""Load window: the recent snapshots of expert load, kept for the planner.

Letters of this module: `G` groups of samples; others as in `placement.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.config import WindowConfig
from ep_rebalance.placement import Placement

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSample:
    """What one snapshot adds to the window.

    counts_ALE: int64 [A, L, E], tokens. Per logical expert, summed over all ranks; a token counts once
        for each expert that it was routed to. Phases are in the order of PHASES.
    steps: engine steps that the snapshot covers.
    step_seconds: mean time of one of them, finite; 0 if none could be timed.
    generation: number of the placement that served them.
    placement: that placement; None if unknown.
    quotas_LP: float64 [L, P]. The share of its expert's tokens that each slot received; None if unknown.
    load_LE: int64 [L, E], tokens. All phases together.
    routed: tokens that the busiest layer routed, each counted once for each of its experts.
    """

    counts_ALE: NDArray[np.int64]
    steps: int
    step_seconds: float
    generation: int = 0
    placement: Placement | None = None
    quotas_LP: NDArray[np.float64] | None = None
    load_LE: NDArray[np.int64] = field(init=False)
    routed: int = field(init=False)

    def __post_init__(self) -> None:
        if self.counts_ALE.ndim != 3 or self.counts_ALE.shape[0] != len(PHASES):
            raise ValueError(
                f"counts must be [{len(PHASES)} phases, layers, experts], got {self.counts_ALE.shape}"
            )
        if not 0.0 <= self.step_seconds < math.inf:
            raise ValueError(f"a step cannot take {self.step_seconds} seconds")
        object.__setattr__(self, "load_LE", self.counts_ALE.sum(axis=0))
        object.__setattr__(self, "routed", int(self.load_LE.sum(axis=1).max()))

    def load_of(self, phases: Sequence[str]) -> NDArray[np.int64]:
        """int64 [L, E], tokens of these phases per logical expert."""
        if set(phases) == set(PHASES):
            return self.load_LE
        load_LE: NDArray[np.int64] = self.counts_ALE[[PHASES.index(phase) for phase in phases]].sum(
            0
        )
        return load_LE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowLoad:
    """The window as a planner sees it.

    tokens_WLE: float64 [W, L, E], tokens. Per logical expert in each sample, oldest first; a token
        counts once for each expert that it was routed to.
    weight_W: float64 [W]. How much a sample counts, by its age; 1 for the newest.
    steps_W: float64 [W]. Engine steps that a sample covers.
    """

    tokens_WLE: NDArray[np.float64]
    weight_W: NDArray[np.float64]
    steps_W: NDArray[np.float64]

    @property
    def load_LE(self) -> NDArray[np.float64]:
        """float64 [L, E], tokens per logical expert, with the samples weighted."""
        load_LE: NDArray[np.float64] = np.einsum("w,wle->le", self.weight_W, self.tokens_WLE)
        return load_LE


class LoadWindow:
    """The last `snapshots` snapshots with tokens; idle ones say nothing and are not kept."""

    def __init__(self, snapshots: int) -> None:
        if snapshots < 1:
            raise ValueError(f"a window must keep at least one snapshot, got snapshots={snapshots}")
        self._samples: deque[LoadSample] = deque(maxlen=snapshots)
        self._since_plan = 0

    def __len__(self) -> int:
        return len(self._samples)

    def append(self, sample: LoadSample) -> None:
        """Add the newest snapshot; drop the oldest one if the window is full.

        Raises ValueError if its layers or experts differ from those already in the window.
        """
        if self._samples and self._samples[0].counts_ALE.shape != sample.counts_ALE.shape:
            raise ValueError(
                f"snapshot of shape {sample.counts_ALE.shape} does not fit a window of "
                f"{self._samples[0].counts_ALE.shape}"
            )
        if sample.routed:
            self._samples.append(sample)
            self._since_plan += 1

    def plan_is_due(self, limits: WindowConfig, interval_snapshots: int) -> bool:
        """Whether enough was seen, both since the previous plan and in all."""
        return (
            self._since_plan >= interval_snapshots
            and len(self) >= limits.min_snapshots
            and self.routed >= limits.min_tokens
        )

    def begin_plan(self) -> int:
        """How many of `samples` came after the previous plan; the count starts again from 0."""
        unseen, self._since_plan = self._since_plan, 0
        return min(unseen, len(self))

    def clear(self) -> None:
        self._samples.clear()
        self._since_plan = 0

    def samples(self) -> tuple[LoadSample, ...]:
        """The snapshots in the window, oldest first."""
        return tuple(self._samples)

    @property
    def routed(self) -> int:
        """Tokens that the busiest layer routed, each counted once for each of its experts."""
        return sum(sample.routed for sample in self._samples)

    @property
    def step_seconds(self) -> float:
        """Mean time of an engine step in the window; 0 if none was timed."""
        timed = [sample for sample in self._samples if sample.step_seconds]
        steps = sum(sample.steps for sample in timed)
        seconds = sum(sample.steps * sample.step_seconds for sample in timed)
        return seconds / steps if steps else 0.0


def window_load(
    samples: Sequence[LoadSample],
    *,
    phases: Sequence[str] = PHASES,
    half_life: float = math.inf,
    max_samples: int = 8,
) -> WindowLoad:
    """The load of `samples`, oldest first, as a planner gets it.

    phases: those whose tokens count.
    half_life: snapshots. A snapshot of this age counts half.
    max_samples: if there are more samples, older ones are summed in groups, because the time to plan
        grows with their number. The newer half stay single.

    Raises ValueError if there are no samples: layers and experts are then unknown.
    """
    if not samples:
        raise ValueError("the load window holds no snapshot with tokens yet")
    groups = _group(len(samples), max_samples)
    tokens_GLE = [sum(samples[i].load_of(phases) for i in group) for group in groups]
    ages_G = [len(samples) - 1 - np.mean(group) for group in groups]
    return WindowLoad(
        tokens_WLE=np.array(tokens_GLE, dtype=np.float64),
        weight_W=0.5 ** (np.array(ages_G) / half_life),
        steps_W=np.array([sum(samples[i].steps for i in group) for group in groups], np.float64),
    )


def _group(count: int, most: int) -> list[NDArray[np.intp]]:
    """Indices 0..count-1 in order, in at most `most` groups.

    If there are more indices than groups, half of the groups hold one of the newest indices each.
    """
    alone = count if count <= most else most // 2
    old, new = np.arange(count - alone), np.arange(count - alone, count)
    groups = np.array_split(old, most - alone) if old.size else []
    return [*groups, *new.reshape(-1, 1)]
