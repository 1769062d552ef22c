"""Our routes on the serving port, below `/ep_rebalance/`.

| route | answer |
|---|---|
| `GET /` | the page; it asks for `overview` |
| `GET status`, `load`, `overview` | JSON |
| `POST pause`, `resume`, `rebalance`, `audit`, `record?on=true` | JSON; change what the balancer does |

Errors are JSON with `error`: 400 for a wrong query, 401 without the key, 403 if control is off, 404 without
the plugin, 409 for what makes no sense now, 413 for a body, 429 for changes that follow each other too
quickly, 503 if the engine does not answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from fastapi import FastAPI, Request, Response

from ep_rebalance.api.auth import Access, Refused
from ep_rebalance.api.change_limit import TooManyChanges
from ep_rebalance.api.engine_client import EngineReports
from ep_rebalance.api.page import CONTENT_SECURITY_POLICY, page
from ep_rebalance.balancer.control import ACTIONS, Action
from ep_rebalance.config import RebalanceConfig

logger = logging.getLogger(__name__)

PREFIX = "/ep_rebalance/"

Handler = Callable[[Request], Awaitable[Response]]
Change = Callable[["Served", Request], Awaitable[dict[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the routes use on a server with the plugin."""

    config: RebalanceConfig
    reports: EngineReports
    access: Access


def add_to(app: FastAPI) -> None:
    """Add all routes. On a server without the plugin they answer 404."""
    reads = {
        "status": EngineReports.status,
        "load": EngineReports.load,
        "overview": EngineReports.overview,
    }
    app.add_api_route(PREFIX, _show_page, methods=["GET"])
    for name, read in reads.items():
        app.add_api_route(PREFIX + name, _reader(read), methods=["GET"])
    for action in ACTIONS:
        app.add_api_route(PREFIX + action, _changer(action, _asker(action)), methods=["POST"])
    app.add_api_route(PREFIX + "record", _changer("record", _record), methods=["POST"])


async def _show_page(request: Request) -> Response:
    """The page holds no data, so it is shown without a key. It asks the user for one if the server does."""
    served = _active(request)
    if served is None or not served.config.metrics.page:
        return _json({"error": "there is no page on this server (metrics.page)"}, 404)
    headers = {
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(page(), media_type="text/html; charset=utf-8", headers=headers)


def _reader(read: Callable[[EngineReports], Awaitable[bytes | None]]) -> Handler:
    async def show(request: Request) -> Response:
        try:
            served = _served(request)
            served.access.check_read(request)
        except Refused as refused:
            return _refusal(refused)
        payload = await read(served.reports)
        if payload is None:
            return _json({"error": "the engine has not answered; try again"}, 503)
        headers = {"cache-control": "no-store"}
        return Response(payload, media_type="application/json", headers=headers)

    return show


def _changer(action: str, change: Change) -> Handler:
    async def apply(request: Request) -> Response:
        try:
            served = _served(request)
        except Refused as refused:
            return _refusal(refused)
        try:
            served.access.check_change(request)
        except Refused as refused:
            served.access.log_refusal(request, action, refused)
            return _refusal(refused)
        try:
            answer = await change(served, request)
        except Refused as refused:
            served.access.log_change(request, action, f"{refused.status} {refused.reason}")
            return _refusal(refused)
        except TooManyChanges as error:
            too_many = _too_many(error)
            served.access.log_refusal(request, action, too_many)
            return _refusal(too_many)
        except Exception as error:
            logger.warning("ep_rebalance: %s was not carried out: %r", action, error)
            return _json({"error": "the engine has not answered; try again"}, 503)
        served.access.log_change(request, action, "done")
        return _json(answer, 200)

    return apply


def _asker(action: Action) -> Change:
    said = {
        "pause": "no plan begins; experts that are moving now still arrive",
        "resume": "plans begin again",
        "rebalance": "a plan begins with the next snapshot; an idle engine takes none",
        "audit": "every slot is checked from the next snapshot on; an idle engine takes none",
    }[action]

    async def ask(served: Served, request: Request) -> dict[str, str]:
        if refusal := await served.reports.ask(action):
            raise Refused(409, refusal)
        return {action: said}

    return ask


async def _record(served: Served, request: Request) -> dict[str, str]:
    on = {"true": True, "false": False}.get(request.query_params.get("on", ""))
    if on is None:
        raise Refused(400, "say ?on=true or ?on=false")
    if served.config.trace.path is None:
        raise Refused(409, "there is nowhere to record to: start with trace.path")
    if fault := await served.reports.record(on):
        raise Refused(409, f"nothing is recorded: {fault}")
    return {"recording": "on" if on else "off"}


def _served(request: Request) -> Served:
    served = _active(request)
    if served is None:
        raise Refused(404, "ep_rebalance is not active on this server")
    return served


def _active(request: Request) -> Served | None:
    """None without the plugin, and also where vLLM never calls `init_state`, as for servers without an
    engine.
    """
    return getattr(request.app.state, "ep_rebalance", None)


def _too_many(error: TooManyChanges) -> Refused:
    said = "try again"
    if error.will_follow:
        said = f"the last one asked for is carried out in {math.ceil(error.wait_seconds)} s"
    return Refused(429, f"too many changes; {said}", retry_after=math.ceil(error.retry_seconds))


def _refusal(refused: Refused) -> Response:
    response = _json({"error": refused.reason}, refused.status)
    if refused.retry_after is not None:
        response.headers["retry-after"] = str(refused.retry_after)
    return response


def _json(content: dict[str, str], status: int) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
