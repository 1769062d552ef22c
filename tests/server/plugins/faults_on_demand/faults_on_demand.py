"""A vLLM plugin that lets one thing go wrong whenever a file of its name appears; for the campaign of faults
only.

FAULTS_ON_DEMAND is the folder it looks into. A file is gone once its fault has happened, on one rank:
`planner-raises`, `planner-exits`, `planner-hangs`, `plan-not-finite`, `byte-flipped`, `packing-fails`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from vllm_eplb_on_cpu import after_kernel_scan

HANG_SECONDS = 20.0


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    if folder := os.environ.get("FAULTS_ON_DEMAND"):
        after_kernel_scan(lambda: _listen(Path(folder)))


def _listen(folder: Path) -> None:
    from ep_rebalance.migration.round_exchange import RoundExchange
    from ep_rebalance.planning import proposal

    def asked(what: str) -> bool:
        """True for one caller only: removing a file succeeds once."""
        try:
            (folder / what).unlink()
        except OSError:
            return False
        return True

    _wrap_planner(proposal, asked)
    _wrap_exchange(RoundExchange, asked)


def _wrap_planner(module: Any, asked: Any) -> None:
    original = module.make_plan

    def make_plan(*args: Any, **kwargs: Any) -> Any:
        if asked("planner-raises"):
            raise MemoryError("asked for")
        if asked("planner-exits"):
            raise SystemExit("asked for")
        if asked("planner-hangs"):
            time.sleep(HANG_SECONDS)
        plan = original(*args, **kwargs)
        if asked("plan-not-finite"):
            plan = dataclasses.replace(plan, quotas_LP=plan.quotas_LP * float("nan"))
        return plan

    module.make_plan = make_plan


def _wrap_exchange(exchange: Any, asked: Any) -> None:
    vote, pack = exchange.vote, exchange._pack

    def flip(self: Any, batch: Any, **told: Any) -> Any:
        arrived = batch.arrivals(self.rank)
        if arrived and asked("byte-flipped"):
            self.staging[arrived[0].staging, 17] ^= 1
        return vote(self, batch, **told)

    def fail(self: Any, *arguments: Any) -> None:
        if asked("packing-fails"):
            raise OSError("asked for")
        pack(self, *arguments)

    exchange.vote, exchange._pack = flip, fail
