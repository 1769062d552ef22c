"""A vLLM plugin that makes the balancer fail on purpose; put on PYTHONPATH by the fault tests only.

FORCED_FAULTS names what fails when, e.g. `planner:1,checksum:2,transport:6`: the first plan raises,
in the second batch that brings rank 1 an expert a byte of it is flipped, in the sixth batch rank 0
cannot pack its experts.

CORRUPTED_SLOT names a file: once it exists, a bit of the last slot of layer 0 on rank 1 is flipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_eplb_on_cpu import after_kernel_scan


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    faults = dict(
        part.split(":") for part in os.environ.get("FORCED_FAULTS", "").split(",") if part
    )
    if faults:
        after_kernel_scan(lambda: _break(faults))
    if file := os.environ.get("CORRUPTED_SLOT"):
        after_kernel_scan(lambda: _corrupt_slot(Path(file)))


def _break(faults: dict[str, str]) -> None:
    from ep_rebalance.migration.round_exchange import RoundExchange
    from ep_rebalance.planning import proposal

    _fail_plan(proposal, int(faults["planner"]))
    _flip_byte(RoundExchange, int(faults["checksum"]))
    _fail_packing(RoundExchange, int(faults["transport"]))


def _fail_plan(module: Any, at: int) -> None:
    original, calls = module.make_plan, []

    def make_plan(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("forced planner exception")
        return original(*args, **kwargs)

    module.make_plan = make_plan


def _flip_byte(exchange: Any, at: int) -> None:
    original, calls = exchange.vote, []

    def vote(self: Any, batch: Any, **told: Any) -> Any:
        arrived = batch.arrivals(self.rank)
        if arrived:
            calls.append(1)
        if arrived and len(calls) == at and self.rank == 1:
            self.staging[arrived[0].staging, 17] ^= 1
        return original(self, batch, **told)

    exchange.vote = vote


def _fail_packing(exchange: Any, at: int) -> None:
    begin, pack, batches = exchange.begin_batch, exchange._pack, []

    def begin_batch(self: Any, batch: Any) -> None:
        batches.append(1)
        begin(self, batch)

    def fail(self: Any, *arguments: Any) -> None:
        if len(batches) == at and self.rank == 0:
            raise OSError("forced transport error")
        pack(self, *arguments)

    exchange.begin_batch, exchange._pack = begin_batch, fail


def _corrupt_slot(file: Path) -> None:
    from ep_rebalance.migration.audit import SlotAudit

    original, flipped = SlotAudit.step, []

    def step(self: Any) -> None:
        if not flipped and self._first_slot > 0 and file.exists():
            flipped.append(1)
            self._memory.slabs_L[0][0].bytes_EB[-1, 43] ^= 0x80  # the sign of a weight
        original(self)

    SlotAudit.step = step
