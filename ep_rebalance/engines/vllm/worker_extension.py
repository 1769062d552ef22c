"""Seam: the worker process.

Target: `ParallelConfig.worker_extension_cls`. Why: vLLM imports this module in a worker only if the
configuration names it, and before it builds the worker's model runner. That makes the import itself
the moment to put the worker's seams in: no server that did not ask for the plugin is touched.
Contract: vllm/v1/worker/worker_base.py, `init_worker`.
"""

from __future__ import annotations

from typing import Any

from ep_rebalance.balancer.control import Action
from ep_rebalance.engines.port import Sessions
from ep_rebalance.engines.vllm import seams
from ep_rebalance.engines.vllm.log_output import share_vllm_log
from ep_rebalance.engines.vllm.parallel import tensor_group
from ep_rebalance.engines.vllm.seams.activation import allow_balancing
from ep_rebalance.engines.vllm.seams.worker import attachment_of


class WorkerExtension:
    """Methods for `collective_rpc`. Their names carry our prefix, since vLLM mixes this class into the
    worker's.

    Reports come from one rank of each pipeline stage that has experts: the engine's first. b"" from others.
    Where an engine has EP rank 0, it is that one, which alone knows of plans that were not carried out.
    """

    model_runner: Any

    def ep_rebalance_status(self) -> bytes:
        """The encoded status."""
        return b"" if (sessions := self._reporting()) is None else sessions.status()

    def ep_rebalance_load(self) -> bytes:
        """The encoded load of every expert since the start."""
        return b"" if (sessions := self._reporting()) is None else sessions.load()

    def ep_rebalance_overview(self) -> bytes:
        """The encoded overview, as our page shows it."""
        return b"" if (sessions := self._reporting()) is None else sessions.overview()

    def ep_rebalance_ask(self, action: Action) -> str | None:
        """Pause, resume or plan now. Returns "" or why not; None from all but EP rank 0 of each stage."""
        attachment = attachment_of(self.model_runner)
        return None if attachment is None else attachment.sessions.ask(action)

    def ep_rebalance_record(self, on: bool) -> bool:
        """Switch the recording of the trace. Returns False on ranks that have no recorder."""
        attachment = attachment_of(self.model_runner)
        return attachment is not None and attachment.sessions.record(on)

    def ep_rebalance_record_answer(self) -> str | None:
        """What came of the last of these calls, see `Session.record_answer`."""
        attachment = attachment_of(self.model_runner)
        return None if attachment is None else attachment.sessions.record_answer()

    def ep_rebalance_step_times(self) -> list[tuple[float, float, bool]]:
        """When each of this rank's steps since the last call began and ended (`time.perf_counter`),
        and whether experts moved in it. For benchmarks.
        """
        attachment = attachment_of(self.model_runner)
        if attachment is None:
            return []
        times = attachment.sessions.target.rebalancer.step_times.take_recent()
        return [(time.began, time.ended, time.migrated) for time in times]

    def _reporting(self) -> Sessions | None:
        attachment = attachment_of(self.model_runner)
        return None if attachment is None or tensor_group().rank_in_group else attachment.sessions


def _install() -> None:
    share_vllm_log()
    allow_balancing()  # never undone: the worker may validate further configurations at any time
    for seam in seams.of_workers():
        seam.install()


_install()
