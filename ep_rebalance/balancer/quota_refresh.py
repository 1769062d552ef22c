"""Quota refresh: between plans the split over replicas follows the load, without moving a byte.

Every rank fits the same quotas to the same window in the background. The snapshot tells when all
have done so; they then change their dispatch tables in the same step, since ranks that share their
tokens must send each of them to the same replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from ep_rebalance.balancer.migrator import Migrator
from ep_rebalance.balancer.planner_thread import PlannerThread
from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.commit import Split
from ep_rebalance.routing.device_tables import RoutingTables


class QuotaRefresh:
    """One rank's part. Does nothing while no expert has a second replica."""

    def __init__(
        self, *, background: PlannerThread, counts: RoutingTables, migrator: Migrator, ranks: int
    ) -> None:
        self._background = background
        self._counts = counts
        self._migrator = migrator
        self._ranks = ranks
        self._job: Future[Split] | None = None

    @property
    def fitted(self) -> bool:
        """Whether this rank's quotas wait for the other ranks. False for good if they could not be
        fitted, until a migration begins; the split then stays as it is everywhere."""
        return self._job is not None and self._job.done() and self._job.exception() is None

    def snapshot(self, fitted: int, samples: Sequence[LoadSample]) -> None:
        """Take up the quotas if `fitted` is all ranks; begin to fit the next ones to `samples`, which
        are none if there is nothing new."""
        if self._job is not None and fitted == self._ranks:
            self._migrator.serve_split(self._job.result())
            self._job = None
        served = self._migrator.served
        if self._job is None and samples and served.placement.num_redundant:
            self._job = self._background.fit_split(samples, served, self._counts)

    def forget(self) -> None:
        """Experts are about to move: what is being fitted is not for their placement."""
        self._job = None
