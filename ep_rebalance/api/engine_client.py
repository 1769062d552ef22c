"""Asks the engine on behalf of the API server, in bounded time and at a bounded rate."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from ep_rebalance.balancer.control import Action
from ep_rebalance.config import MetricsConfig
from ep_rebalance.telemetry.metrics import decode
from ep_rebalance.telemetry.prometheus import Exporter

logger = logging.getLogger(__name__)

FRESH_SECONDS = 0.2
"""Up to this age an answer is reused: however many ask, the engine is asked five times a second at most."""

_STATUS = "ep_rebalance_status"


class EngineReports:
    """Asks the workers, through vLLM's own `collective_rpc`."""

    def __init__(self, engine_client: Any, config: MetricsConfig) -> None:
        self._engine = engine_client
        self._config = config
        self._answers: dict[str, tuple[float, bytes | None]] = {}
        self._asking: dict[str, asyncio.Task[bytes | None]] = {}
        self._status: bytes | None = None

    async def status(self) -> bytes | None:
        """The encoded status, or the previous one if the engine does not answer in time; None if there is
        none yet.
        """
        self._status = await self._report(_STATUS) or self._status
        return self._status

    async def load(self) -> bytes | None:
        """The encoded load of every expert; None if the engine does not answer in time."""
        return await self._report("ep_rebalance_load")

    async def overview(self) -> bytes | None:
        """The encoded overview; None if the engine does not answer in time."""
        return await self._report("ep_rebalance_overview")

    async def record(self, on: bool) -> None:
        """Switch the recording of the trace. Raises TimeoutError, and whatever the engine raises."""
        await self._change("ep_rebalance_record", on)

    async def ask(self, action: Action) -> str:
        """Pass on an operator's request. Returns "" or why it cannot be followed; raises as `record` does."""
        # Only EP rank 0 answers anything but None, and it may belong to another API server's engines.
        answers = [a for a in await self._change("ep_rebalance_ask", action) if a is not None]
        if not answers:
            return "EP rank 0 is not here; ask the server of data-parallel rank 0"
        return str(answers[0])

    async def export(self, exporter: Exporter) -> None:
        """Keep the metrics up to date, for ever. Never raises: a fault in them must not harm the server."""
        while True:
            payload = await self._report(_STATUS)
            if payload is not None:
                try:
                    exporter.update(decode(payload))
                except Exception:
                    logger.exception("ep_rebalance: metrics were not updated")
            await asyncio.sleep(self._config.poll_seconds)

    async def _report(self, method: str) -> bytes | None:
        """The answer to a question that may be shared; None if there was none.

        Only one such question is under way. All who ask meanwhile, or shortly afterwards, share its answer.
        """
        answered, answer = self._answers.get(method, (-math.inf, None))
        if time.monotonic() - answered < FRESH_SECONDS:
            return answer
        if method not in self._asking:
            self._asking[method] = asyncio.create_task(self._fetch(method))
        # Shielded: a client that goes away cancels its own request, not the question that others share.
        return await asyncio.shield(self._asking[method])

    async def _fetch(self, method: str) -> bytes | None:
        try:
            answers = await self._ask(method)
            answer = next((answer for answer in answers if answer), None)
        except Exception as error:
            logger.debug("ep_rebalance: %s was not answered: %r", method, error)
            answer = None
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
