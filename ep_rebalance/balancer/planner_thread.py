"""Planner thread: planning, working out rounds, fitting quotas.

All of these take too long for the step path. Nothing here talks to other ranks: `jobs.py` picks up a
job's result or its exception, and announces it in the next snapshot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ep_rebalance.collectives.plan_broadcast import read_plan
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.window import LoadSample
from ep_rebalance.migration.commit import PreparedMigration, Split
from ep_rebalance.migration.configured import schedule_as_configured
from ep_rebalance.migration.served import Served
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import cost_model
from ep_rebalance.planning.problem import Planner
from ep_rebalance.planning.proposal import Proposer, TimedProposal, planned_load
from ep_rebalance.routing.device_tables import RoutingTables
from ep_rebalance.topology import Topology

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class DaemonThread:
    """Runs jobs one after the other. Unlike an executor's, a job that hangs does not keep the process alive.

    One thread serves all jobs, since `Thread.start` waits until the new thread runs.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=_run, args=(self._jobs,), name="ep_rebalance", daemon=True).start()

    def submit(self, job: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a job once those before it are done."""
        future: Future[Result] = Future()

        def carry_out() -> None:
            try:
                future.set_result(job(*arguments))
            except BaseException as error:
                # Uncaught, it would end the thread, and no later job would run.
                future.set_exception(error)

        self._jobs.put(carry_out)
        return future


def _run(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


class PlannerThread:
    """The jobs of `rank`.

    expert_bytes_L: L sizes, bytes. One packed expert of each layer.
    """

    def __init__(
        self,
        *,
        config: RebalanceConfig,
        planner: Planner,
        topology: Topology,
        expert_bytes_L: Sequence[int],
        rank: int,
    ) -> None:
        self._config = config
        self._rank = rank
        self._topology = topology
        self._expert_bytes_L = expert_bytes_L
        self._thread = DaemonThread()
        self._cost = cost_model(config)
        self._proposer = Proposer(
            planner=planner,
            settings=config.planner,
            decision=config.decision,
            migration=config.migration,
            cost=self._cost,
            topology=topology,
            expert_bytes_L=expert_bytes_L,
            by_own_counts=config.dispatch.by_own_counts,
        )

    def propose(
        self, samples: Sequence[LoadSample], served: Served, unseen: int, step_seconds: float
    ) -> Future[TimedProposal]:
        """Plan from `served` and decide whether the plan is worth its migration.

        Other arguments are those of `Proposer.propose`.
        """
        return self._thread.submit(self._propose, samples, served, unseen, step_seconds)

    def schedule(
        self, served: Served, wire: NDArray[np.int64], counts: RoutingTables
    ) -> Future[PreparedMigration]:
        """Read a plan that was broadcast, and work out the rounds that lead to it and their commits."""
        # Copied, since the next broadcast reuses the buffer.
        return self._thread.submit(self._schedule, served, wire.copy(), counts)

    def fit_split(
        self, samples: Sequence[LoadSample], served: Served, counts: RoutingTables
    ) -> Future[Split]:
        """Fit quotas for the placement that is served to the window's load."""
        return self._thread.submit(self._fit_split, samples, served.placement, counts)

    def _propose(
        self, samples: Sequence[LoadSample], served: Served, unseen: int, step_seconds: float
    ) -> TimedProposal:
        began = time.perf_counter()
        proposal = self._proposer.propose(
            samples, served.placement, unseen=unseen, step_seconds=step_seconds
        )
        return TimedProposal(proposal=proposal, seconds=time.perf_counter() - began)

    def _schedule(
        self, served: Served, wire: NDArray[np.int64], counts: RoutingTables
    ) -> PreparedMigration:
        current = served.placement
        try:
            slots_LP, quotas_LP, pace = read_plan(wire)
            target = Placement(slots_LP, current.num_experts, current.num_ranks)
            target.check_quotas(quotas_LP)
            migration = schedule_as_configured(
                self._config,
                current,
                target,
                quotas_LP,
                topology=self._topology,
                expert_bytes_L=self._expert_bytes_L,
                pace=pace,
                rank=self._rank,
            )
            return PreparedMigration.of(migration, counts)
        except BaseException:  # also what ends a thread
            logger.exception("ep_rebalance: the rounds could not be worked out")
            raise

    def _fit_split(
        self, samples: Sequence[LoadSample], placement: Placement, counts: RoutingTables
    ) -> Split:
        load = planned_load(self._config.planner, samples)
        try:
            quotas_LP = self._cost.split(load, placement)
            placement.check_quotas(quotas_LP)
            tables = counts.dispatch_tables(placement, quotas_LP, load.load_LE)
            return Split(quotas_LP=quotas_LP, tables=tables)
        except BaseException:  # also what ends a thread
            logger.exception("ep_rebalance: the quotas could not be fitted; they stay as they are")
            raise
