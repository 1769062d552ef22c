"""Routes of the API server, with an engine that is made up."""

import asyncio
import logging
import os
from argparse import Namespace
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from engine_clients import ROUTES, STATUS, EngineClient
from fastapi import FastAPI

from ep_rebalance.api import change_limit
from ep_rebalance.api.engine_client import EngineReports
from ep_rebalance.balancer.recorder import NOT_ANSWERED
from ep_rebalance.config_sources import load_config
from ep_rebalance.engines.vllm.endpoint import create_endpoint_plugin

CHANGES = {
    "pause": ("ep_rebalance_ask", "pause"),
    "resume": ("ep_rebalance_ask", "resume"),
    "rebalance": ("ep_rebalance_ask", "rebalance"),
    "audit": ("ep_rebalance_ask", "audit"),
    "record?on=true": ("ep_rebalance_record", True),
}
ENABLED = {"control": {"enabled": True, "api_key_file": "operator"}, "trace": {"path": "traces"}}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [*(n for n in os.environ if n.startswith("EP_REBALANCE_")), "VLLM_API_KEY"]:
        monkeypatch.delenv(name, raising=False)


@asynccontextmanager
async def client_of(engine, api_key=None):
    """Of a server with that engine."""
    app, plugin = FastAPI(), create_endpoint_plugin()
    plugin.attach_router(app)
    await plugin.init_state(engine, app.state, Namespace(api_key=api_key))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://server"
    ) as client:
        yield client


def ask(engine, *routes: str, api_key=None, token=None, method="GET", **request):
    """The answers of a server with that engine, one request after the other."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    headers |= request.pop("headers", {})

    async def asked() -> list[httpx.Response]:
        async with client_of(engine, api_key) as client:
            urls = [f"/ep_rebalance/{route}" for route in routes]
            return [await client.request(method, u, headers=headers, **request) for u in urls]

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


def test_routes_that_read_can_be_guarded_by_our_own_key():
    engine = EngineClient(control={"guard_reads": True, "api_key_file": "operator"})
    assert [a.status_code for a in ask(engine, *ROUTES)] == [401] * 3
    assert [a.status_code for a in ask(engine, *ROUTES, token="operator")] == [200] * 3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("engine", [None, EngineClient(active=False)])
def test_a_server_without_the_plugin_says_so(route, engine):
    (answer,) = ask(engine, route)
    assert answer.status_code == 404
    assert "not active" in answer.json()["error"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_server_that_never_came_up_says_so(method):
    app = FastAPI()
    create_endpoint_plugin().attach_router(app)

    async def asked():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x"
        ) as client:
            return await client.request(
                method, f"/ep_rebalance/{'status' if method == 'GET' else 'pause'}"
            )

    assert asyncio.run(asked()).status_code == 404


@pytest.mark.parametrize("route", ROUTES)
def test_an_engine_that_does_not_answer_in_time_is_503(route):
    (answer,) = ask(EngineClient(silent=True), route)
    assert answer.status_code == 503
    assert "try again" in answer.json()["error"]


def test_a_burst_of_readers_asks_the_engine_once():
    engine = EngineClient()

    async def burst() -> list[httpx.Response]:
        async with client_of(engine) as client:
            return await asyncio.gather(*(client.get("/ep_rebalance/status") for _ in range(50)))

    assert {answer.content for answer in asyncio.run(burst())} == {STATUS}
    assert len(engine.asked) <= 2


def test_a_burst_on_a_silent_engine_is_answered_within_one_timeout():
    engine = EngineClient(silent=True)

    async def burst() -> list[int]:
        async with client_of(engine) as client:
            answers = await asyncio.gather(*(client.get("/ep_rebalance/load") for _ in range(50)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(burst()) == [503] * 50
    assert engine.asked == ["ep_rebalance_load"]


@pytest.mark.parametrize("route", CHANGES)
def test_a_change_is_handed_to_the_engine(route):
    engine = EngineClient(**ENABLED)
    (answer,) = ask(engine, route, method="POST", token="operator")
    assert answer.status_code == 200
    assert engine.told == [CHANGES[route]]


@pytest.mark.parametrize("route", CHANGES)
@pytest.mark.parametrize(
    ("control", "api_key", "token", "code"),
    [
        ({}, "s3cret", "s3cret", 403),
        ({"enabled": True}, None, None, 403),
        ({"enabled": True}, "s3cret", None, 401),
        ({"enabled": True}, "s3cret", "wrong", 401),
        ({"enabled": True}, "s3cret", "s3cre", 401),
        ({"enabled": True}, "s3cret", "s3cret", 200),
        ({"enabled": True, "api_key_file": "operator"}, "s3cret", "s3cret", 401),
        ({"enabled": True, "api_key_file": "operator"}, "s3cret", "operator", 200),
    ],
)
def test_a_change_needs_control_and_its_key(route, control, api_key, token, code):
    engine = EngineClient(**{**ENABLED, "control": control})
    (answer,) = ask(engine, route, method="POST", api_key=api_key, token=token)
    assert answer.status_code == code
    assert len(engine.told) == (code == 200)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "operator"},
        {"authorization": "Basic operator"},
        {"authorization": "Bearer  operator"},
        {"authorization": "Bearer \xff"},
        {"x-api-key": "operator"},
        {"cookie": "authorization=Bearer operator"},
    ],
)
def test_a_key_counts_only_as_a_bearer_token(headers):
    engine = EngineClient(**ENABLED)
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for url in ("pause", "pause?api_key=operator", "pause?authorization=Bearer%20operator"):
        (answer,) = ask(engine, url, method="POST", headers=raw)
        assert answer.status_code == 401
        assert engine.told == []


@pytest.mark.parametrize("body", [b"x" * 2000, b"x" * (1 << 20)])
def test_a_change_takes_no_body(body):
    engine = EngineClient(**ENABLED)
    (answer,) = ask(engine, "pause", method="POST", token="operator", content=body)
    assert (answer.status_code, engine.told) == (413, [])


def test_a_change_that_makes_no_sense_now_says_why():
    engine = EngineClient(**ENABLED)
    engine.says = "it is paused already"
    (answer,) = ask(engine, "pause", method="POST", token="operator")
    assert (answer.status_code, answer.json()) == (409, {"error": "it is paused already"})


def test_a_server_without_ep_rank_0_sends_on_to_the_one_that_has_it():
    engine = EngineClient(**ENABLED)
    engine.says = None
    (answer,) = ask(engine, "pause", method="POST", token="operator")
    assert answer.status_code == 409
    assert "data-parallel rank 0" in answer.json()["error"]


def test_a_server_without_ep_rank_0_records_nothing_and_says_so():
    engine = EngineClient(**ENABLED)
    engine.says = None
    (answer,) = ask(engine, "record?on=true", method="POST", token="operator")
    assert answer.status_code == 409
    assert "data-parallel rank 0" in answer.json()["error"]


@pytest.mark.parametrize(
    ("disk", "code", "told"),
    [
        pytest.param([""], 200, "on", id="it records"),
        pytest.param([NOT_ANSWERED, NOT_ANSWERED, ""], 200, "on", id="after a while"),
        pytest.param([NOT_ANSWERED], 409, f"nothing is recorded: {NOT_ANSWERED}", id="it hangs"),
        pytest.param([NOT_ANSWERED, "full"], 409, "nothing is recorded: full", id="it refuses"),
        pytest.param(["dead"], 409, "nothing is recorded: dead", id="the thread has ended"),
    ],
)
def test_recording_is_on_only_if_the_disk_takes_it(disk, code, told):
    engine = EngineClient(**ENABLED)
    engine.disk = disk
    (answer,) = ask(engine, "record?on=true", method="POST", token="operator")
    assert (answer.status_code, list(answer.json().values())) == (code, [told])
    (answer,) = ask(engine, "record?on=false", method="POST", token="operator")
    assert answer.json() == {"recording": "off"}


@pytest.mark.parametrize("route", CHANGES)
def test_a_change_is_503_if_the_engine_is_silent(route):
    (answer,) = ask(EngineClient(silent=True, **ENABLED), route, method="POST", token="operator")
    assert answer.status_code == 503


@pytest.mark.parametrize("route", CHANGES)
def test_a_change_is_no_question(route):
    engine = EngineClient(**ENABLED)
    for method in ("GET", "PUT", "DELETE", "HEAD"):
        (answer,) = ask(engine, route, method=method, token="operator")
        assert (answer.status_code, engine.told) == (405, [])


def test_who_changed_what_is_logged_and_a_burst_of_guesses_in_one_line(caplog):
    engine = EngineClient(**ENABLED)
    with caplog.at_level(logging.WARNING):
        ask(engine, "pause", method="POST", token="operator")
        ask(engine, *["pause"] * 40, method="POST", token="guess")
    lines = [record.getMessage() for record in caplog.records if "audit" in record.getMessage()]
    assert lines == [
        "ep_rebalance: audit: 127.0.0.1 asked to pause: done",
        "ep_rebalance: audit: 127.0.0.1 was refused to pause: 401 Unauthorized "
        "(1 refused since the line before)",
    ]


@pytest.mark.parametrize(
    ("api_rank", "data_parallel_rank", "exports"),
    [(0, 0, True), (-1, 0, True), (1, 0, False), (0, 1, False)],
)
def test_one_server_of_all_exports(api_rank, data_parallel_rank, exports, monkeypatch):
    engine, exporters = EngineClient(), []
    parallel = engine.vllm_config.parallel_config
    parallel._api_process_rank, parallel.data_parallel_rank = api_rank, data_parallel_rank
    monkeypatch.setattr(
        "ep_rebalance.engines.vllm.endpoint.Exporter", lambda **made: exporters.append(made)
    )
    ask(engine, "status")
    assert len(exporters) == exports


def test_a_question_that_was_cancelled_can_be_asked_again():
    engine = EngineClient()
    answer, calls = engine.collective_rpc, []

    async def cancelled_once(method, args=()):
        calls.append(method)
        if len(calls) == 1:
            raise asyncio.CancelledError
        return await answer(method, args)

    async def asked() -> tuple[bool, bool, bytes | None]:
        reports = EngineReports(engine, load_config().metrics)
        engine.collective_rpc = cancelled_once
        shown: list[Any] = []
        exporter = SimpleNamespace(update=shown.append)
        exporting = asyncio.create_task(reports.export(exporter))
        await asyncio.sleep(0.05)
        alive = not exporting.done()
        exporting.cancel()
        await asyncio.sleep(0.3)
        status = await reports.status()
        return alive, exporting.cancelled(), status

    assert asyncio.run(asked()) == (True, True, STATUS)


@pytest.fixture
def quick_limit(monkeypatch):
    monkeypatch.setattr(change_limit, "SECONDS_PER_CHANGE", 0.3)


@pytest.mark.usefixtures("quick_limit")
@pytest.mark.parametrize(
    ("routes", "last"),
    [
        (("resume", "pause"), ("ep_rebalance_ask", "pause")),
        (("record?on=true", "record?on=false"), ("ep_rebalance_record", False)),
    ],
)
def test_of_a_storm_of_changes_few_reach_the_engine_and_the_last_one_holds(routes, last):
    engine = EngineClient(**ENABLED)

    async def storm() -> list[httpx.Response]:
        async with client_of(engine) as client:
            headers = {"authorization": "Bearer operator"}
            answers = [
                await client.post(f"/ep_rebalance/{routes[number % 2]}", headers=headers)
                for number in range(100)
            ]
            await asyncio.sleep(1.0)
            return answers

    answers = asyncio.run(storm())
    codes = [answer.status_code for answer in answers]
    assert codes[:4] == [200] * 4
    assert set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert "carried out" in refused.json()["error"]
    assert len(engine.told) < 20
    assert engine.told[-1] == last


def test_who_heeds_retry_after_is_not_kept_waiting_by_what_is_carried_out_meanwhile():
    async def refused_then_patient() -> tuple[httpx.Response, httpx.Response]:
        async with client_of(EngineClient(**ENABLED)) as client:
            headers = {"authorization": "Bearer operator"}
            for _ in range(5):
                refused = await client.post("/ep_rebalance/pause", headers=headers)
            await asyncio.sleep(float(refused.headers["retry-after"]))
            return refused, await client.post("/ep_rebalance/pause", headers=headers)

    refused, later = asyncio.run(refused_then_patient())
    assert (refused.status_code, later.status_code) == (429, 200)


@pytest.mark.usefixtures("quick_limit")
def test_requests_that_are_no_states_are_not_repeated():
    engine = EngineClient(**ENABLED)
    answers = ask(engine, *["rebalance"] * 30, "pause", method="POST", token="operator")
    codes = [answer.status_code for answer in answers]
    assert codes[4] == 429
    assert "try again" in answers[4].json()["error"]
    assert codes[-1] == 200
    assert len(engine.told) < 20
