"""Jobs: what the loop asked a rank for that takes longer than a step.

A job runs in the planner thread, is announced in snapshots once it is done, and its result is taken when
every rank has announced its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.balancer.asks import FitQuotas, Propose
from ep_rebalance.balancer.planner_thread import PlannerThread
from ep_rebalance.collectives.snapshot import Flags
from ep_rebalance.load.snapshot import Agreed
from ep_rebalance.migration.commit import PreparedMigration, Split
from ep_rebalance.migration.proof import in_a_line
from ep_rebalance.migration.served import Served
from ep_rebalance.planning.proposal import Proposal, TimedProposal
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.telemetry.events import ErrorCaught, Event, GotStuck, PlanEnded, PlanProposed

logger = logging.getLogger(__name__)


class RankJobs:
    """One rank's jobs.

    deadline_seconds: after which a plan is overdue.
    tell: called with each event.

    The attribute `proposal` is rank 0's newest plan; None before the first, and on all other ranks.
    """

    def __init__(
        self,
        thread: PlannerThread,
        *,
        counts: RoutingTables,
        rank: int,
        deadline_seconds: float,
        tell: Callable[[Event], None],
    ) -> None:
        self.thread = thread
        self.proposal: Proposal | None = None
        self._counts = counts
        self._rank = rank
        self._deadline_seconds = deadline_seconds
        self._tell = tell
        self._overdue_at = 0.0
        self._planning: Future[TimedProposal] | None = None
        self._scheduling: Future[PreparedMigration] | None = None
        self._fitting: Future[Split] | None = None
        self._told_of_fitting = False

    def propose(self, asked: Propose, served: Served) -> None:
        """Begin to plan, on rank 0; the others do nothing."""
        self._overdue_at = time.monotonic() + self._deadline_seconds
        if self._rank == 0:
            self._planning = self.thread.propose(
                asked.samples, served, asked.unseen, asked.step_seconds
            )

    def work_out_rounds(self, wire: NDArray[np.int64], served: Served) -> None:
        """Begin to work out the rounds of the plan that was broadcast."""
        self._scheduling = self.thread.schedule(served, wire, self._counts)

    def fit_quotas(self, asked: FitQuotas, served: Served) -> None:
        """Begin to fit the quotas for what is served."""
        self._fitting = self.thread.fit_split(asked.samples, served, self._counts)
        self._told_of_fitting = False

    def announced(self) -> Flags:
        """What is done. A plan is announced once, other jobs until they are taken or forgotten."""
        planned = proposed = False
        if self._planning is not None and self._planning.done():
            planned, proposed = True, self._take_proposal(self._planning)
            self._planning = None
        elif self._planning is not None and time.monotonic() > self._overdue_at:
            self._tell(GotStuck("the planner takes longer than planner.deadline_seconds"))
        if _raised(self._fitting) and not self._told_of_fitting:
            self._told_of_fitting = True
            self._tell(ErrorCaught("quotas", "they could not be fitted to the window"))
        return Flags(
            planned=int(planned),
            proposed=int(proposed),
            scheduled=int(_succeeded(self._scheduling)),
            failed=int(_raised(self._scheduling)),
            fitted=int(_succeeded(self._fitting)),
        )

    def take_rounds(self) -> PreparedMigration:
        """The rounds. To be called once every rank has announced its own."""
        assert self._scheduling is not None
        prepared, self._scheduling = self._scheduling.result(), None
        return prepared

    def take_quotas(self) -> Split:
        """The quotas. To be called once every rank has announced its own."""
        assert self._fitting is not None
        split, self._fitting = self._fitting.result(), None
        return split

    def forget_quotas(self) -> None:
        """Drop quotas that are being fitted: they are for a placement that is about to change."""
        self._fitting = None

    def forget_what_ended(self, agreed: Agreed) -> None:
        """Drop the jobs of a plan that the loop gives up: weights were replaced, or a rank has no rounds."""
        if agreed.replaced:
            self._planning = None
        if agreed.replaced or agreed.unscheduled_ranks:
            self._scheduling = None

    def _take_proposal(self, job: Future[TimedProposal]) -> bool:
        """Keep rank 0's plan. Returns whether it is to be carried out."""
        error = job.exception()
        if error is not None:  # also what ends a thread, and must not end this one
            logger.error("ep_rebalance: planning failed; serving goes on unchanged", exc_info=error)
            reason = f"the planner raised {in_a_line(error)}"
            self._tell(PlanEnded("failed", reason))
            return False
        timed = job.result()
        self._tell(PlanProposed(timed))
        self.proposal = timed.proposal
        return timed.proposal.decision.accepted


def _succeeded(job: Future[Any] | None) -> bool:
    return job is not None and job.done() and job.exception() is None


def _raised(job: Future[Any] | None) -> bool:
    return job is not None and job.done() and job.exception() is not None
