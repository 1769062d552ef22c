"""Asks the engine on behalf of the API server, in bounded time and at a bounded rate."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from ep_rebalance.balancer.control import Action
from ep_rebalance.balancer.recorder import NOT_ANSWERED
from ep_rebalance.config import MetricsConfig
from ep_rebalance.telemetry.load_report import ExpertLoad
from ep_rebalance.telemetry.metrics import Status, decode
from ep_rebalance.telemetry.overview_report import Overview
from ep_rebalance.telemetry.prometheus import Exporter
from ep_rebalance.telemetry.whole_pipeline import Report, whole_report

logger = logging.getLogger(__name__)

FRESH_SECONDS = 0.2
"""Up to this age an answer is reused: however many ask, the engine is asked five times a second at most."""

_STATUS = "ep_rebalance_status"

_NOT_HERE = "EP rank 0 is not here; ask the server of data-parallel rank 0"
_DISK_ASKED_TIMES = 20
_DISK_ASKED_EVERY_SECONDS = 0.1


class EngineReports:
    """Asks the workers, through vLLM's own `collective_rpc`."""

    def __init__(self, engine_client: Any, config: MetricsConfig) -> None:
        self._engine = engine_client
        self._config = config
        self._answers: dict[str, tuple[float, list[bytes]]] = {}
        self._asking: dict[str, asyncio.Task[list[bytes]]] = {}
        self._status: bytes | None = None

    async def status(self) -> bytes | None:
        """The encoded status, or the previous one if the engine does not answer in time; None if there is
        none yet.
        """
        self._status = await self._whole(_STATUS, Status) or self._status
        return self._status

    async def load(self) -> bytes | None:
        """The encoded load of every expert; None if the engine does not answer in time."""
        return await self._whole("ep_rebalance_load", ExpertLoad)

    async def overview(self) -> bytes | None:
        """The encoded overview; None if the engine does not answer in time."""
        return await self._whole("ep_rebalance_overview", Overview)

    async def record(self, on: bool) -> str:
        """Switch the recording of the trace. Returns "" or why nothing is recorded.

        Raises TimeoutError, and whatever the engine raises.
        """
        if not any(await self._change("ep_rebalance_record", on)):
            return _NOT_HERE
        answer = NOT_ANSWERED if on else ""
        for _ in range(_DISK_ASKED_TIMES):
            if answer != NOT_ANSWERED:
                break
            # A disk answers in a thread of its own; the engine's steps do not wait for it.
            await asyncio.sleep(_DISK_ASKED_EVERY_SECONDS)
            told = [told for told in await self._ask("ep_rebalance_record_answer") if told]
            answer = NOT_ANSWERED if NOT_ANSWERED in told else "; ".join(told)
        return answer

    async def ask(self, action: Action) -> str:
        """Pass on an operator's request. Returns "" or why it cannot be followed; raises as `record` does."""
        # Only EP rank 0 of each pipeline stage answers anything but None, and these may belong to another
        # API server's engines.
        answers = [a for a in await self._change("ep_rebalance_ask", action) if a is not None]
        if not answers:
            return _NOT_HERE
        # A request that some stages follow is followed.
        return "" if "" in answers else str(answers[0])

    async def export(self, exporter: Exporter) -> None:
        """Keep the metrics up to date, for ever. Never raises: a fault in them must not harm the server."""
        while True:
            for payload in await self._report(_STATUS):
                try:
                    exporter.update(decode(payload))
                except Exception:
                    logger.exception("ep_rebalance: metrics were not updated")
            await asyncio.sleep(self._config.poll_seconds)

    async def _whole(self, method: str, kind: type[Report]) -> bytes | None:
        payloads = await self._report(method)
        return whole_report(payloads, kind) if payloads else None

    async def _report(self, method: str) -> list[bytes]:
        """What each pipeline stage answers to a question that may be shared; [] if none does.

        Only one such question is under way. All who ask meanwhile, or shortly afterwards, share its answer.
        """
        answered, answer = self._answers.get(method, (-math.inf, []))
        if time.monotonic() - answered < FRESH_SECONDS:
            return answer
        if method not in self._asking:
            self._asking[method] = asyncio.create_task(self._fetch(method))
        # Shielded: a client that goes away cancels its own request, not the question that others share.
        return await asyncio.shield(self._asking[method])

    async def _fetch(self, method: str) -> list[bytes]:
        try:
            answer = [payload for payload in await self._ask(method) if payload]
        except Exception as error:
            logger.debug("ep_rebalance: %s was not answered: %r", method, error)
            answer = []
        self._answers[method] = time.monotonic(), answer
        del self._asking[method]
        return answer

    async def _change(self, method: str, argument: object) -> list[Any]:
        """Ask all workers for a change."""
        answers = await self._ask(method, argument)
        self._answers.clear()  # so that whoever asks next sees the change
        return answers

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        async with asyncio.timeout(self._config.poll_timeout_seconds):
            answers: list[Any] = await self._engine.collective_rpc(method, args=arguments)
            return answers
