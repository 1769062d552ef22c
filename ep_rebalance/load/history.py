"""Load memory: what was seen before the window, in sums of similar samples.

Kinds of traffic come back, and experts that were busy together will be so again. A handful of sums
stands for them: when there is one too many, the two that are most alike are merged.

Letters of this module: `X` the experts of all layers, flattened; others as in `placement.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.load.window import WindowLoad

LOADS = 8
"""How many sums are kept. The time to plan grows with their number."""

HALF_LIFE_SAMPLES = 400.0
"""A load counts half after this many more samples, so that traffic that has ended is forgotten."""


class LoadHistory:
    """What was seen before the window: `add` extends it, and `joined` puts it before a window."""

    def __init__(self) -> None:
        self._loads: list[NDArray[np.float64]] = []
        self._steps: list[float] = []
        self._added = 0

    def add(self, load: WindowLoad) -> None:
        """Remember every sample of `load`, whatever its weight.

        The two sums that are most alike are those that Ward (1963) would merge: merging them adds least
        to the squared distances of the experts' shares from the mean shares of their sum, each weighted
        by its tokens. Samples without tokens have no shares and say nothing.
        """
        for tokens_LE, steps in zip(load.tokens_WLE, load.steps_W, strict=True):
            if tokens_LE.any():
                self._remember(tokens_LE, float(steps))

    def _remember(self, tokens_LE: NDArray[np.float64], steps: float) -> None:
        fade = 0.5 ** (1.0 / HALF_LIFE_SAMPLES)
        for older_LE in self._loads:
            older_LE *= fade
        self._steps = [fade * older for older in self._steps]  # tokens per step stay what they were
        self._loads.append(tokens_LE.copy())
        self._steps.append(steps)
        self._added += 1
        if len(self._loads) > LOADS:
            first, second = _most_alike(np.stack(self._loads))
            self._loads[first] += self._loads.pop(second)
            self._steps[first] += self._steps.pop(second)

    def joined(self, recent: WindowLoad, share: float) -> WindowLoad:
        """`recent`, with the memory as further samples before it.

        share: 0 or more, below 1. The fraction of all weighted tokens that the memory makes up; less
            for as long as it has seen fewer samples than there are in `recent`.
        """
        if not self._loads or share <= 0.0:
            return recent
        memory_WLE = np.stack(self._loads)
        weighted = float(recent.weight_W @ recent.tokens_WLE.sum(axis=(1, 2)))
        filled = min(1.0, self._added / len(recent.weight_W))
        # weight * memory / (weight * memory + recent) = share, solved for weight
        weight = filled * share / (1.0 - share) * weighted / memory_WLE.sum()
        return WindowLoad(
            tokens_WLE=np.concatenate([memory_WLE, recent.tokens_WLE]),
            weight_W=np.append(np.full(len(memory_WLE), weight), recent.weight_W),
            steps_W=np.append(self._steps, recent.steps_W),
        )


def _most_alike(tokens_WLE: NDArray[np.float64]) -> tuple[int, int]:
    """The indices of the two samples to merge, the smaller one first."""
    # Ward's growth for sums of a and b tokens: |share_a - share_b|^2 / (1 / a + 1 / b).
    total_W = tokens_WLE.sum(axis=(1, 2))
    shares_WX = tokens_WLE.reshape(len(total_W), -1) / total_W[:, None]
    products_WW = shares_WX @ shares_WX.T
    squares_W = np.diagonal(products_WW)
    distance_WW = squares_W[:, None] + squares_W - 2.0 * products_WW
    growth_WW = distance_WW / (1.0 / total_W[:, None] + 1.0 / total_W)
    growth_WW[np.tril_indices(len(total_W))] = np.inf
    first, second = np.unravel_index(np.argmin(growth_WW), growth_WW.shape)
    return int(first), int(second)
