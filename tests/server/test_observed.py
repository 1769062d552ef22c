"""What operators see and may do, on one server with two data-parallel ranks, two API servers and a key."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from answers import assert_counts_are_right
from browser import needs_chromium, open_tab
from engines import V032
from metrics_page import assert_metrics_agree, samples
from prometheus import needs_prometheus, prometheus_of
from prometheus_client.parser import text_string_to_metric_families
from serving import DATA_PARALLEL, OPERATOR, PLUGIN, Server, prompts, serving
from test_dashboards import FILES, filled, load

from ep_rebalance.dashboards.build import expressions
from ep_rebalance.dashboards.promql import VLLM

pytestmark = V032.marks

READER = "the server's key"
OBSERVED = {
    "metrics": {"layer_rank_tokens": True, "expert_tokens": True, "replicas": True},
}
WATCHED_SECONDS = 45
BURST = 10_000


@pytest.fixture(scope="module")
def observed(logs: Path, settings_file: str, operators_key: str) -> Iterator[Server]:
    settings = {
        **OBSERVED,
        "control": {"enabled": True, "api_key_file": operators_key},
        "state": {"path": str(logs / "observed.npz")},
    }
    arguments = (*DATA_PARALLEL, *PLUGIN, "--ep-rebalance-config", settings_file)
    more = ("--ep-rebalance-config", json.dumps(settings), "--api-server-count", "2")
    with serving(logs / "observed.log", *arguments, *more, "--api-key", READER) as server:
        server.authorise(READER)
        yield server


def change(server: Server, path: str, key: str | None = OPERATOR, **request) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    url = f"{server.url}/ep_rebalance/{path}"
    return httpx.post(url, headers=headers, timeout=60, **request)


# --- two API servers, two data-parallel ranks


def test_each_api_server_answers_and_asks_for_the_key(observed: Server) -> None:
    for route in ("status", "load", "overview"):
        assert httpx.get(f"{observed.url}/ep_rebalance/{route}").status_code == 401
    observed.answers(prompts(per_domain=2))
    for _ in range(4):
        assert observed.status()["ep_size"] == observed.load()["ep_size"] == 2


def test_counters_are_the_tokens_that_were_routed(observed: Server) -> None:
    def scraped(server: Server) -> dict[str, int]:
        time.sleep(1.5)  # a poll of the engine and no other traffic
        seen = samples(server)
        return {p: int(seen["ep_rebalance_phase_tokens_total", p]) for p in ("prefill", "decode")}

    assert_counts_are_right(observed, scraped)
    status, seen = observed.status(), samples(observed)
    pairs = sum(scraped(observed).values()) * int(status["info"]["top_k"]) * status["layers"]
    of_ranks = [
        value for (name, _), value in seen.items() if name == "ep_rebalance_rank_tokens_total"
    ]
    of_experts = [
        value for (name, _), value in seen.items() if name == "ep_rebalance_expert_tokens_total"
    ]
    assert (len(of_ranks), sum(of_ranks)) == (2, pairs)
    assert (len(of_experts), sum(of_experts)) == (status["layers"] * status["experts"], pairs)


def test_metrics_of_two_api_servers_agree_with_the_status(observed: Server) -> None:
    observed.answers(prompts(per_domain=4, skip=8))
    assert_metrics_agree(observed)


# --- dashboards and the page, while experts move


@needs_prometheus
def test_every_panel_has_data(observed: Server, tmp_path: Path) -> None:
    with prometheus_of(urlsplit(observed.url).netloc, tmp_path) as prometheus:
        start = observed.status()["generation"]
        end = time.monotonic() + WATCHED_SECONDS
        observed.drive_until(lambda s: s["generation"] >= start + 2 and time.monotonic() > end)
        time.sleep(2)
        empty = [
            (path.stem, title, expression)
            for path in FILES
            for title, expression in expressions(load(path))
            if not prometheus.range(filled(expression).replace("1m", "10s").replace("1h", "30s"))
        ]
    assert empty == []


def test_vllm_exports_what_the_dashboards_show_of_it(observed: Server) -> None:
    families = text_string_to_metric_families(observed.metrics())
    names = {sample.name for family in families for sample in family.samples}
    assert {f"vllm:{name}" for name in VLLM} <= names


@needs_chromium
def test_the_page_follows_the_status_while_experts_move(observed: Server, tmp_path: Path) -> None:
    start = observed.status()["generation"]
    with open_tab(tmp_path) as tab:
        tab.open(f"{observed.url}/ep_rebalance/")
        tab.wait_for("!document.getElementById('key').hidden")
        tab.evaluate(f'document.getElementById("secret").value = "{READER}"')
        tab.evaluate("document.querySelector('#key button').click()")
        tab.wait_for("!document.getElementById('main').hidden")
        driver = threading.Thread(
            target=observed.drive_until, args=(lambda s: s["generation"] >= start + 2,)
        )
        driver.start()
        tab.wait_for(f"+document.getElementById('generation').textContent >= {start + 1}", 300)
        driver.join()
        status = observed.status()
        tab.wait_for(
            f"document.getElementById('generation').textContent === '{status['generation']}'"
        )
        moved = sum(status["migrated_experts"].values())
        tab.wait_for(f"document.getElementById('experts').textContent === '{moved}'")
        tab.wait_for("document.getElementById('state').textContent.startsWith('idle')")
        status = observed.status()
        assert tab.text("#served") == f"{status['overall_imbalance']['served']:.3f}"
        assert tab.text("#contiguous") == f"{status['overall_imbalance']['contiguous']:.3f}"
        assert tab.evaluate("document.querySelectorAll('#commits tr').length") == len(
            status["commits"]
        )
        assert tab.evaluate("document.querySelectorAll('#course .commit').length") >= 1
        assert [message for message in tab.messages if "401" not in message] == []
        assert all(request.startswith((observed.url, "data:")) for request in tab.requests)


# --- control


def test_an_operator_pauses_resumes_and_asks_for_a_plan(observed: Server) -> None:
    assert [change(observed, "pause").status_code for _ in range(2)] == [200, 200]
    assert change(observed, "rebalance").status_code == 409
    before = observed.drive_until(lambda s: s["paused"] and s["activity"] == "watching")
    for _ in range(3):
        observed.answers(prompts(per_domain=8, skip=8))
    after = observed.status()
    assert (after["generation"], after["plans"]) == (before["generation"], before["plans"])
    assert samples(observed)["ep_rebalance_paused", ""] == 1
    assert [change(observed, "resume").status_code for _ in range(2)] == [200, 200]
    assert change(observed, "rebalance").status_code == 200
    plans = sum(after["plans"].values())
    observed.drive_until(
        lambda s: not s["paused"] and sum(s["plans"].values()) > plans, seconds=120
    )
    assert "audit: 127.0.0.1 asked to pause: done" in observed.log_text()
    assert OPERATOR not in observed.log_text()


def test_attacks_change_nothing(observed: Server) -> None:
    url = f"{observed.url}/ep_rebalance/pause"
    for key in (None, "wrong", READER, OPERATOR[:-1], "é", "x" * 8000):
        for path in ("pause", "rebalance", "resume", "record?on=true", f"pause?key={OPERATOR}"):
            raw = None if key is None else f"Bearer {key}".encode()
            headers = {} if raw is None else {"authorization": raw}
            answer = httpx.post(f"{observed.url}/ep_rebalance/{path}", headers=headers)
            assert answer.status_code == 401, (key, path)
    assert httpx.post(url, content=b"x" * (20 << 20), timeout=60).status_code == 401
    assert change(observed, "pause", content=b"x" * (20 << 20)).status_code == 413
    assert change(observed, "pause", content=iter([b"x" * 1000])).status_code == 413
    for key in (None, OPERATOR):
        for path in TRICKS:
            assert raw_post(observed, path, key) in (307, 401, 404, 405), path
    assert raw_post(observed, "/ep_rebalance/%70ause", None) == 401
    assert observed.status()["paused"] == 0
    assert len(observed.answer("import os\n")) == 64


TRICKS = (
    "/ep_rebalance/../ep_rebalance/pause",
    "//ep_rebalance/pause",
    "/ep_rebalance//pause",
    "/ep_rebalance/pause/",
    "/ep_rebalance/./pause",
    "/EP_REBALANCE/PAUSE",
    "/ep_rebalance/pause%00",
    "/ep_rebalance/pause%2f..%2fstatus",
    "/ep_rebalance/status/../pause",
    "/v1/%2e%2e/ep_rebalance/pause",
    "/ep_rebalance/pause;x=1",
    "/ep_rebalance/../../etc/passwd",
)


def raw_post(server: Server, path: str, key: str | None) -> int:
    """As it is: other clients tidy the path up."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    connection.request("POST", path, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_burst_of_requests_changes_nothing_and_serving_goes_on(observed: Server) -> None:
    before = observed.status()
    lines = observed.log_text().count("was refused to")

    async def burst() -> set[int]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            todo = iter(range(BURST))

            async def worker() -> set[int]:
                seen = set()
                for number in todo:
                    if number % 2:
                        answer = await client.post(f"{observed.url}/ep_rebalance/pause")
                    else:
                        answer = await client.get(
                            f"{observed.url}/ep_rebalance/status",
                            headers={"authorization": f"Bearer {READER}"},
                        )
                    seen.add(answer.status_code)
                return seen

            return set().union(*await asyncio.gather(*(worker() for _ in range(50))))

    answers: list[list[int]] = []
    asking = threading.Thread(target=lambda: answers.append(observed.answer("import os\n")))
    asking.start()
    assert asyncio.run(burst()) == {200, 401}
    asking.join()
    assert len(answers[0]) == 64
    after = observed.status()
    assert (after["paused"], after["plans"]["failed"]) == (0, before["plans"]["failed"])
    assert observed.log_text().count("was refused to") - lines <= 20
