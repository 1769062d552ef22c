"""Asks the engine on behalf of the API server, in bounded time and at a bounded rate."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from ep_rebalance.api.change_limit import ChangeLimit, TooManyChanges
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
        self._limits: dict[str, ChangeLimit] = {}
        # What was asked for too soon, the newest of each subject, and who will carry it out.
        self._wanted: dict[str, tuple[str, object]] = {}
        self._later: dict[str, asyncio.Task[None]] = {}

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

        Raises TooManyChanges, TimeoutError, and whatever the engine raises. Of switches that came too soon,
        the last one is carried out as soon as one may.
        """
        if not any(await self._limited("record", "ep_rebalance_record", on, switches=True)):
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
        switches = action in ("pause", "resume")
        subject = "pause" if switches else action
        # Only EP rank 0 of each pipeline stage answers anything but None, and these may belong to another
        # API server's engines.
        told = await self._limited(subject, "ep_rebalance_ask", action, switches=switches)
        answers = [a for a in told if a is not None]
        if not answers:
            return _NOT_HERE
        # A request that some stages follow is followed.
        return "" if "" in answers else str(answers[0])

    async def export(self, exporter: Exporter) -> None:
        """Keep the metrics up to date, for ever. Never raises: a fault in them must not harm the server."""
        while True:
            try:
                for payload in await self._report(_STATUS):
                    exporter.update(decode(payload))
            except Exception:
                logger.exception("ep_rebalance: metrics were not updated")
            except asyncio.CancelledError:
                # Of the question that it shares, unless it is itself to end.
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
            await asyncio.sleep(self._config.poll_seconds)

    async def _whole(self, method: str, kind: type[Report]) -> bytes | None:
        payloads = await self._report(method)
        try:
            return whole_report(payloads, kind) if payloads else None
        except Exception:  # as where a number of one stage was not finite
            logger.exception("ep_rebalance: the answers to %s make no whole", method)
            return None

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
        answer: list[bytes] = []
        try:
            answer = [payload for payload in await self._ask(method) if payload]
        except Exception as error:
            logger.debug("ep_rebalance: %s was not answered: %r", method, error)
        finally:
            # Also of a question that was cancelled, or nobody could ask it any more.
            self._answers[method] = time.monotonic(), answer
            del self._asking[method]
        return answer

    async def _limited(
        self, subject: str, method: str, argument: object, *, switches: bool
    ) -> list[Any]:
        """Ask for a change, unless the subject was changed too often.

        switches: whether changes of the subject are states of which the last one holds.
        """
        limit = self._limits.setdefault(subject, ChangeLimit())
        if wait := limit.take():
            if switches:
                self._wanted[subject] = method, argument
                if subject not in self._later:
                    self._later[subject] = asyncio.create_task(self._follow(subject, wait))
            raise TooManyChanges(wait, will_follow=switches)
        self._wanted.pop(subject, None)
        return await self._change(method, argument)

    async def _follow(self, subject: str, wait: float) -> None:
        """Carry out what was asked for last, once it may pass, unless something was that passed at once."""
        try:
            while subject in self._wanted:
                await asyncio.sleep(wait)
                if wait := self._limits[subject].take():
                    continue
                if wanted := self._wanted.pop(subject, None):
                    await self._carry_out(*wanted)
        finally:
            del self._later[subject]

    async def _carry_out(self, method: str, argument: object) -> None:
        try:
            await self._change(method, argument)
        except Exception as error:
            logger.warning("ep_rebalance: a change that waited was not carried out: %r", error)

    async def _change(self, method: str, argument: object) -> list[Any]:
        """Ask all workers for a change."""
        answers = await self._ask(method, argument)
        self._answers.clear()  # so that whoever asks next sees the change
        return answers

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        async with asyncio.timeout(self._config.poll_timeout_seconds):
            answers: list[Any] = await self._engine.collective_rpc(method, args=arguments)
            return answers
