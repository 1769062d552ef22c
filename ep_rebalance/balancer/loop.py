"""The loop: watch the load, plan, work out rounds, migrate. The same in a server and in a replay.

It knows neither engine nor ranks nor clock: it yields what it asks for and is sent the answers. It
branches only on what all ranks have agreed on, so every rank asks for the same things in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable

from ep_rebalance.balancer.asks import (
    Asks,
    FitQuotas,
    Migrate,
    NextSnapshot,
    Propose,
    ServeLoaded,
    TakeRounds,
    TakeUpQuotas,
    Tell,
    WorkOutRounds,
    ask,
)
from ep_rebalance.config import RebalanceConfig
from ep_rebalance.load.snapshot import Agreed, Snapshot
from ep_rebalance.load.window import LoadWindow
from ep_rebalance.migration.batches import Migration
from ep_rebalance.telemetry.events import ActivityBegan, Event, GotStuck, GotUnstuck, PlanEnded
from ep_rebalance.telemetry.metrics import Activity, PlanOutcome

WEIGHTS_REPLACED = "the engine's weights were replaced"


class BalancingLoop:
    """The loop of one model.

    replicated: whether any expert has a second slot, so that its tokens can be split.

    window: the load that plans are made from.
    activity: what the loop is doing.
    """

    def __init__(self, config: RebalanceConfig, *, replicated: bool) -> None:
        self.window = LoadWindow(config.window.snapshots)
        self.activity: Activity = "watching"
        self._config = config
        self._plans = config.mode == "rebalance" and config.planner.policy != "none"
        self._replicated = replicated
        self._fitting = False
        self._cold = True  # until a plan has little left to gain

    def run(self) -> Asks[None]:
        """Never ends."""
        while True:
            yield from self._watch()
            if (yield from self._plan()):
                migration = yield from self._work_out_rounds()
                if migration is not None:
                    yield from self._migrate()
                    self._cold = migration.pace.hurried

    def _watch(self) -> Asks[None]:
        """Take snapshots until it is time to plan."""
        yield from self._begin("watching")
        while True:
            agreed = (yield from self._snapshot()).agreed
            held = agreed.paused or agreed.replaced
            asked = agreed.plan_asked and len(self.window) > 0
            if self._plans and not held and (asked or self._plan_is_due()):
                return

    def _plan(self) -> Asks[bool]:
        """Have a plan made. Returns whether there is one to carry out."""
        yield from self._begin("planning")
        unseen = self.window.begin_plan()
        yield from ask(
            Propose(
                samples=self.window.samples(),
                unseen=unseen,
                step_seconds=self.window.step_seconds,
            )
        )
        self._cold = False
        agreed = yield from self._until(lambda agreed: agreed.planned)
        if agreed.replaced:
            return (yield from self._give_up("abandoned", WEIGHTS_REPLACED))
        yield from _tell(GotUnstuck())  # in case the plan was overdue
        if agreed.proposed and agreed.paused:
            reason = "an operator paused before it could begin"
            return (yield from self._give_up("abandoned", reason))
        return agreed.proposed

    def _work_out_rounds(self) -> Asks[Migration | None]:
        """Tell all ranks the plan, and have each work out its rounds. Returns None if the plan ends here."""
        yield from self._begin("scheduling")
        yield from ask(WorkOutRounds())
        agreed = yield from self._until(lambda agreed: agreed.scheduled or _failed(agreed))
        if agreed.replaced:
            yield from self._give_up("abandoned", WEIGHTS_REPLACED)
            return None
        if agreed.unscheduled_ranks:
            reason = f"{agreed.unscheduled_ranks} rank(s) could not work out the rounds"
            yield from self._give_up("failed", reason)
            return None
        migration = yield from ask(TakeRounds())
        limits = self._config.migration
        if migration.num_steps > limits.deadline_steps:
            yield from self._give_up(
                "over_budget",
                f"moving {migration.num_moves} experts takes {migration.num_steps} steps at "
                f"{migration.pace.max_bytes} bytes per step, more than "
                f"migration.deadline_steps={limits.deadline_steps}",
            )
            return None
        return migration

    def _migrate(self) -> Asks[None]:
        self._fitting = False
        yield from self._begin("migrating")
        yield from ask(Migrate())

    def _snapshot(self) -> Asks[Snapshot]:
        """Take the next snapshot, and do what follows from it for quotas and for replaced weights."""
        snapshot = yield from ask(NextSnapshot())
        self.window.append(snapshot.sample)
        yield from self._refresh_quotas(snapshot)
        if snapshot.agreed.reloaded:
            self._fitting = False
            self.window.clear()  # other weights route tokens differently
            self._cold = True
            yield from ask(ServeLoaded(snapshot.agreed.reloaded))
            yield from _tell(GotUnstuck())
        elif snapshot.agreed.replaced:
            yield from _tell(
                GotStuck(
                    "the weights of some ranks were replaced, and of others not yet, or copies of experts "
                    "are still to be written; the log of the ranks has more"
                )
            )
        return snapshot

    def _refresh_quotas(self, snapshot: Snapshot) -> Asks[None]:
        """Let the split over replicas follow the load between plans, without moving a byte.

        If a rank cannot fit its quotas, the split stays as it is on all ranks until a migration begins.
        """
        if self._fitting and snapshot.agreed.fitted:
            self._fitting = False
            yield from ask(TakeUpQuotas())
        if not self._fitting and self._replicated and snapshot.sample.routed:
            self._fitting = True
            yield from ask(FitQuotas(self.window.samples()))

    def _until(self, done: Callable[[Agreed], bool]) -> Asks[Agreed]:
        """Take snapshots until `done`, or until weights were replaced. Returns what was then agreed on."""
        while True:
            agreed = (yield from self._snapshot()).agreed
            if done(agreed) or agreed.replaced:
                return agreed

    def _plan_is_due(self) -> bool:
        """While much is to be gained, one snapshot since the last plan is enough."""
        interval = 1 if self._cold else self._config.planner.interval_snapshots
        return self.window.plan_is_due(self._config.window, interval)

    def _begin(self, activity: Activity) -> Asks[None]:
        self.activity = activity
        yield from _tell(ActivityBegan(activity))

    def _give_up(self, outcome: PlanOutcome, reason: str) -> Asks[bool]:
        """Report what became of the plan. Always returns False: nothing is to be carried out."""
        yield from _tell(PlanEnded(outcome, reason))
        return False


def _tell(event: Event) -> Asks[None]:
    return ask(Tell(event))


def _failed(agreed: Agreed) -> bool:
    return agreed.unscheduled_ranks > 0
