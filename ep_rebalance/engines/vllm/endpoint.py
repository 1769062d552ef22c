"""Seam: the API server - `GET /ep_rebalance/status`, `GET /ep_rebalance/load`, `POST
/ep_rebalance/record`, and our metrics on vLLM's own `/metrics`.

Target: the entry point group `vllm.endpoint_plugins` (vllm/plugins/endpoint_plugins/interface.py).
Why: workers export nothing, and vLLM's statistics have no place for a plugin's; the API server
polls the engine instead. With several API servers only the first one exports; each answers the
routes.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from ep_rebalance.config import MetricsConfig, RebalanceConfig, load_config
from ep_rebalance.engines.vllm.arguments import CONFIG_KEY
from ep_rebalance.exporter import Exporter
from ep_rebalance.metrics import decode

logger = logging.getLogger(__name__)


def create_endpoint_plugin() -> EndpointPlugin:
    """Entry point of `vllm.endpoint_plugins`."""
    return EndpointPlugin()


class EngineReports:
    """Reads what the engine reports, in bounded time."""

    def __init__(self, engine_client: Any, config: MetricsConfig) -> None:
        self._engine = engine_client
        self._config = config
        self._last: bytes | None = None

    async def status(self) -> bytes | None:
        """The encoded status; the one before if the engine does not answer in time; None before the
        first.
        """
        self._last = await self._ask("ep_rebalance_snapshot") or self._last
        return self._last

    async def load(self) -> bytes | None:
        """The encoded load of every expert; None if the engine does not answer in time."""
        return await self._ask("ep_rebalance_load")

    async def _ask(self, method: str) -> bytes | None:
        try:
            async with asyncio.timeout(self._config.poll_timeout_seconds):
                answers = await self._engine.collective_rpc(method)
            return next((answer for answer in answers if answer), None)
        except Exception as error:
            logger.debug("ep_rebalance: %s was not answered: %r", method, error)
            return None

    async def record(self, on: bool) -> None:
        """Switch the recording of the trace. Raises what the engine raises, TimeoutError included."""
        async with asyncio.timeout(self._config.poll_timeout_seconds):
            await self._engine.collective_rpc("ep_rebalance_record", args=(on,))

    async def export(self, exporter: Exporter) -> None:
        """Fill the metrics for ever. Never raises: the server must not notice."""
        while True:
            payload = await self.status()
            if payload is not None:
                try:
                    exporter.update(decode(payload))
                except Exception:
                    logger.exception("ep_rebalance: metrics were not updated")
            await asyncio.sleep(self._config.poll_seconds)


class EndpointPlugin:
    """Implements vLLM's `EndpointPlugin` protocol."""

    name = "ep_rebalance"
    required_tasks: tuple[Any, ...] | None = ("generate", "pooling")

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes."""
        for path, show in (("status", show_status), ("load", show_load)):
            app.add_api_route(f"/ep_rebalance/{path}", show, methods=["GET"])
        app.add_api_route("/ep_rebalance/record", switch_recording, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Begin to poll, if this engine runs the plugin."""
        state.ep_rebalance_keys = _api_keys(args)
        state.ep_rebalance = None
        if engine_client is None:
            return
        vllm_config = engine_client.vllm_config
        settings = vllm_config.additional_config.get(CONFIG_KEY)
        if settings is None:
            return
        config = load_config(settings)
        state.ep_rebalance_config = config
        state.ep_rebalance = EngineReports(engine_client, config.metrics)
        if vllm_config.parallel_config._api_process_rank in (0, -1):
            names = getattr(args, "served_model_name", None) or [vllm_config.model_config.model]
            exporter = Exporter(model_name=names[0], config=config.metrics)
            state.ep_rebalance_poll = asyncio.create_task(state.ep_rebalance.export(exporter))


async def show_status(request: Request) -> Response:
    """The whole status as JSON."""
    return await _show(request, EngineReports.status)


async def show_load(request: Request) -> Response:
    """What every expert got since the start, and where it is served, as JSON."""
    return await _show(request, EngineReports.load)


async def _show(
    request: Request, read: Callable[[EngineReports], Awaitable[bytes | None]]
) -> Response:
    """401 without the server's API key, 404 without the plugin, 503 if the engine does not answer."""
    state = request.app.state
    if not _authorised(request, state.ep_rebalance_keys):
        return _json({"error": "Unauthorized"}, 401)
    if state.ep_rebalance is None:
        return _json({"error": "ep_rebalance is not active on this server"}, 404)
    payload = await read(state.ep_rebalance)
    if payload is None:
        return _json({"error": "the engine has not answered; try again"}, 503)
    return Response(payload, media_type="application/json")


async def switch_recording(request: Request) -> Response:
    """Begin or end a trace: `POST /ep_rebalance/record?on=true`.

    404 without the plugin, 403 unless `control.enabled`, 401 without the key, 400 without `on`, 409
    without `trace.path`, 503 if the engine does not answer.
    """
    state = request.app.state
    if state.ep_rebalance is None:
        return _json({"error": "ep_rebalance is not active on this server"}, 404)
    config: RebalanceConfig = state.ep_rebalance_config
    if refusal := _control_refused(request, config, state.ep_rebalance_keys):
        return refusal
    on = {"true": True, "false": False}.get(request.query_params.get("on", ""))
    if on is None:
        return _json({"error": "say ?on=true or ?on=false"}, 400)
    if config.trace.path is None:
        return _json({"error": "there is nowhere to record to: start with trace.path"}, 409)
    try:
        await state.ep_rebalance.record(on)
    except Exception as error:
        logger.warning("ep_rebalance: recording was not switched: %r", error)
        return _json({"error": "the engine has not answered; try again"}, 503)
    client = request.client.host if request.client else "unknown"
    logger.info("ep_rebalance: %s switched recording %s", client, "on" if on else "off")
    return _json({"recording": "on" if on else "off"}, 200)


def _control_refused(
    request: Request, config: RebalanceConfig, server_keys: list[str]
) -> Response | None:
    """Why a request may change nothing, or None. A server without any key has none to prove."""
    if not config.control.enabled:
        return _json({"error": "control.enabled is false on this server"}, 403)
    keys = [config.control.api_key] if config.control.api_key else server_keys
    if not keys:
        return _json({"error": "control needs --api-key or control.api_key"}, 403)
    return None if _authorised(request, keys) else _json({"error": "Unauthorized"}, 401)


def _api_keys(args: Namespace) -> list[str]:
    """vLLM's `--api-key` guards only /v1, so the routes of a plugin check it themselves."""
    given = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY")
    keys = [given] if isinstance(given, str) else list(given or [])
    return [key for key in keys if key]


def _authorised(request: Request, keys: list[str]) -> bool:
    if not keys:
        return True
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and any(
        hmac.compare_digest(token.encode(), key.encode()) for key in keys
    )


def _json(content: dict[str, str], status: int) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
