"""Sessions: those of a model and of its drafter, as one to the engine that runs both.

Each balances its own model. All collectives of the one come before those of the other, on every rank alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from ep_rebalance.balancer.control import Action
from ep_rebalance.balancer.draft_session import DraftSession
from ep_rebalance.balancer.session import Session
from ep_rebalance.telemetry.metrics import encode


@dataclass(frozen=True, slots=True)
class Sessions:
    """One rank's.

    uncounted: why a drafter that has experts has no session, as a clause; "" otherwise.
    """

    target: Session
    drafter: DraftSession | None = None
    uncounted: str = ""

    def __post_init__(self) -> None:
        self.target.rebalancer.status.uncounted_drafter = self.uncounted

    @property
    def both(self) -> tuple[Session, ...]:
        return (self.target,) if self.drafter is None else (self.target, self.drafter)

    def begin_step(
        self,
        phases_T: NDArray[np.int8],
        tokens_R: NDArray[np.integer],
        *,
        started: float | None = None,
        continues: bool = False,
    ) -> None:
        """See `Session.begin_step`.

        tokens_R: [R] tokens of each request, which lie one after another.
        """
        self.target.begin_step(phases_T, started=started, continues=continues)
        if self.drafter is not None:
            self.drafter.begin_drafting(phases_T, tokens_R, started=started, continues=continues)

    def end_step(self) -> None:
        """See `Session.end_step`. The drafter's passes of the step were issued too."""
        for session in self.both:
            session.end_step()

    @property
    def busy(self) -> bool:
        return self.target.busy

    @property
    def has_moved_experts(self) -> bool:
        return any(session.has_moved_experts for session in self.both)

    def before_weights_go(self) -> None:
        """See `Session.before_weights_go`."""
        for session in self.both:
            session.before_weights_go()

    def status(self) -> bytes:
        """The encoded status, with the drafter's in it."""
        drafter = None if self.drafter is None else self.drafter.rebalancer.status_now()
        status = self.target.rebalancer.status_now()
        return encode(msgspec.structs.replace(status, drafter=drafter))

    def overview(self) -> bytes:
        """The encoded overview, with the drafter's in it."""
        drafter = None if self.drafter is None else self.drafter.rebalancer.overview()
        overview = self.target.rebalancer.overview()
        return encode(msgspec.structs.replace(overview, drafter=drafter))

    def load(self) -> bytes:
        """The encoded load of every expert, with the drafter's in it."""
        drafter = None if self.drafter is None else self.drafter.expert_load()
        return encode(msgspec.structs.replace(self.target.expert_load(), drafter=drafter))

    def ask(self, action: Action) -> str | None:
        """Take an operator's request. Returns as `Session.ask`: "" if either model's balancer follows it."""
        told = [session.ask(action) for session in self.both]
        return "" if "" in told else told[0]

    def record(self, on: bool) -> bool:
        """See `Session.record`."""
        switched = [session.record(on) for session in self.both]
        return any(switched)

    def record_answer(self) -> str | None:
        """See `Session.record_answer`. Of two answers, that which says more."""
        told = [session.record_answer() for session in self.both]
        return next((answer for answer in told if answer), told[0])
