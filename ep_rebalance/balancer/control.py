"""Control: what an operator asks for while the server runs.

A request reaches the ranks at different moments, so only rank 0 takes it. The others learn of it from
the next snapshot, and all of them act on it in the same step.
"""

from __future__ import annotations

from typing import Literal, get_args

from ep_rebalance.config import RebalanceConfig

Action = Literal["pause", "resume", "rebalance", "audit"]
ACTIONS: tuple[Action, ...] = get_args(Action)


class Control:
    """The requests that rank 0 has taken.

    paused: no plan is to begin.
    plan_asked: one is to begin with the next snapshot.
    audit_asked: all slots are to be checked from the next snapshot on.
    """

    def __init__(self, config: RebalanceConfig) -> None:
        self.paused = False
        self.plan_asked = False
        self.audit_asked = False
        self._config = config

    def ask(self, action: Action, *, busy: bool) -> str:
        """Take a request. Returns "" or why it cannot be followed. To pause what is paused changes nothing,
        and so with a resume: of several requests the last one holds, however often it was sent.

        busy: whether a plan is being made or carried out.
        """
        if refusal := self._refusal(action, busy):
            return refusal
        if action == "audit":
            self.audit_asked = True
        elif action == "rebalance":
            self.plan_asked = True
        else:
            self.paused = action == "pause"
        return ""

    def _refusal(self, action: Action, busy: bool) -> str:
        if action == "audit":
            return self._audit_refusal()
        if self._config.mode != "rebalance":
            return f"mode {self._config.mode} never moves experts"
        if self._config.planner.policy == "none":
            return "planner.policy none never plans"
        if action == "rebalance" and self.paused:
            return "it is paused; resume it first"
        if action == "rebalance" and (self.plan_asked or busy):
            return "a plan is already requested or under way"
        return ""

    def _audit_refusal(self) -> str:
        if self._config.mode == "observe":
            return "mode observe never reads experts"
        if not self._config.audit.slots_per_minute:
            return "no checksums were taken at start: audit.slots_per_minute is 0"
        return ""
