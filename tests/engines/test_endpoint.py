"""Routes of the API server, with an engine that is made up."""

import asyncio
import os
from argparse import Namespace
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from test_exporter import make_status

from ep_rebalance.config import load_config
from ep_rebalance.engines.vllm.endpoint import create_endpoint_plugin
from ep_rebalance.metrics import encode

STATUS, LOAD = encode(make_status()), b'{"layers":[]}'
ROUTES = {"status": ("ep_rebalance_snapshot", STATUS), "load": ("ep_rebalance_load", LOAD)}


class EngineClient:
    """Answers like the workers of one engine, or not in time if it is `silent`."""

    def __init__(self, *, active: bool = True, silent: bool = False) -> None:
        settings = load_config({"metrics": {"poll_timeout_seconds": 0.05}}).as_dict()
        self.vllm_config = SimpleNamespace(
            additional_config={"ep_rebalance": settings} if active else {},
            parallel_config=SimpleNamespace(_api_process_rank=1),
        )
        self.silent = silent
        self.asked: list[str] = []

    async def collective_rpc(self, method: str) -> list[bytes]:
        self.asked.append(method)
        if self.silent:
            await asyncio.sleep(60)
        return [b"", dict(ROUTES.values())[method]]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [*(n for n in os.environ if n.startswith("EP_REBALANCE_")), "VLLM_API_KEY"]:
        monkeypatch.delenv(name, raising=False)


def ask(engine, *routes: str, api_key=None, token=None) -> list[httpx.Response]:
    """The answers of a server with that engine, one request after the other."""

    async def asked() -> list[httpx.Response]:
        app, plugin = FastAPI(), create_endpoint_plugin()
        plugin.attach_router(app)
        await plugin.init_state(engine, app.state, Namespace(api_key=api_key))
        headers = {"authorization": f"Bearer {token}"} if token else {}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.get(f"/ep_rebalance/{r}", headers=headers) for r in routes]

    return asyncio.run(asked())


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_asks_the_engine_for_nothing_but_its_own_answer(route):
    engine = EngineClient()
    (answer,) = ask(engine, route)
    method, payload = ROUTES[route]
    assert (answer.status_code, answer.content) == (200, payload)
    assert answer.headers["content-type"] == "application/json"
    assert engine.asked == [method]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("token", "code"), [(None, 401), ("wrong", 401), ("s3cret", 200), ("other", 200)]
)
def test_a_route_asks_for_the_api_key(route, token, code):
    engine = EngineClient()
    (answer,) = ask(engine, route, api_key=["s3cret", "other"], token=token)
    assert answer.status_code == code
    assert len(engine.asked) == (code == 200)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("engine", [None, EngineClient(active=False)])
def test_a_server_without_the_plugin_says_so(route, engine):
    (answer,) = ask(engine, route)
    assert answer.status_code == 404
    assert "not active" in answer.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
def test_an_engine_that_does_not_answer_in_time_is_503(route):
    (answer,) = ask(EngineClient(silent=True), route)
    assert answer.status_code == 503
    assert "try again" in answer.json()["error"]
