"""Draft passes: which rows of a drafter's forward passes are tokens.

A drafter runs several times in one engine step: first over the rows of the step, then over one row of each
request, once for each further token that it drafts. Rows beyond are padding. A pass that a CUDA graph holds
reads the same memory in every step, so what is marked for the later passes lies on the device from the first
pass on, and is copied there in stream order.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ep_rebalance.kernels.shared_arithmetic import DECODE, IGNORED
from ep_rebalance.routing.device_tables import RoutingTables


class DraftPasses:
    """Marks the tokens of each pass in `counts`, the tables of a drafter's layers."""

    def __init__(self, counts: RoutingTables) -> None:
        self._counts = counts
        self._later_T = torch.full_like(counts.phase_T, IGNORED)
        self._requests = 0
        self._step: tuple[NDArray[np.int8], NDArray[np.integer]] | None = None

    def begin_step(self, phases_T: NDArray[np.int8], tokens_R: NDArray[np.integer]) -> None:
        """The target's tokens of a step are known.

        phases_T: int8 [T]. PREFILL or DECODE for each of them.
        tokens_R: [R] tokens of each request, which lie one after another.
        """
        self._step = phases_T, tokens_R

    def begin_pass(self, rows: int) -> None:
        """A pass of the drafter is next. Without a step, it marks nothing; a graph may be captured meanwhile.

        rows: the first of its rows, which are tokens. Looked at in the first pass of a step only: a later
            one has one for each request.
        """
        if self._step is None:
            self._counts.phase_T.copy_(self._later_T)
            return
        phases_T, tokens_R = self._step
        self._step = None
        self._counts.mark_tokens(first_pass(phases_T, tokens_R, rows))
        if self._counts.counts_here:
            self._requests = min(len(tokens_R), len(self._later_T))
            self._later_T[: self._requests].fill_(DECODE)

    def end_step(self) -> None:
        """Forget the requests, so that dummy steps count nothing. The tables forget what they marked."""
        self._step = None
        if self._requests:
            self._later_T[: self._requests].fill_(IGNORED)
        self._requests = 0


def first_pass(
    phases_T: NDArray[np.int8], tokens_R: NDArray[np.integer], rows: int
) -> NDArray[np.int8]:
    """int8 [rows], the phases of the first pass of a step.

    A drafter takes the target's rows, or of each request equally many more, for the token that the target
    sampled. It is of the phase of its request. Rows that a drafter packs otherwise, without those that were
    rejected or of tokens that it drafts at once, are DECODE if their number shows it.
    """
    tokens, requests = len(phases_T), len(tokens_R)
    if rows == tokens:
        return phases_T
    more, rest = divmod(rows - tokens, max(requests, 1))
    if more < 0 or rest or tokens_R.sum() != tokens or not tokens_R.all():
        return np.full(rows, DECODE, dtype=np.int8)
    firsts_R = np.concatenate(([0], tokens_R.cumsum()[:-1]))
    return np.repeat(phases_T[firsts_R], tokens_R + more)
