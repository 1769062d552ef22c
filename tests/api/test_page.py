"""The page in a real browser, with the real routes and an engine that is made up."""

from __future__ import annotations

import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvicorn
from browser import Tab, needs_chromium, open_tab
from engine_clients import EngineClient
from fastapi import FastAPI
from statuses import make_status

from ep_rebalance.engines.vllm.endpoint import create_endpoint_plugin
from ep_rebalance.placement import Placement
from ep_rebalance.telemetry.metrics import Commit, Status, encode
from ep_rebalance.telemetry.overview_report import Overview, overview

HOSTILE = "<img src=x onerror=alert(1)>"


def made_up_status() -> Status:
    status = make_status()
    status.model = f"org/{HOSTILE}"
    status.snapshots = 5
    status.overall_imbalance = {"served": 1.125, "contiguous": 1.5}
    status.busiest_rank_tokens = {"served": 75, "contiguous": 100}
    status.migrated_experts = {"local": 0, "intranode": 12, "internode": 3}
    status.migrated_bytes = {"local": 0, "intranode": 3 << 20, "internode": 0}
    status.reported_timestamp = time.time()
    status.last_commit_timestamp = status.reported_timestamp - 30
    status.message = f"said {HOSTILE}"
    status.measured_gain = {"low": 0.03, "estimate": 0.04, "high": 0.05}
    status.expert_time = {"low": 0.5, "estimate": 0.6, "high": 0.7}
    status.expert_time_learned = 1
    status.commits = [
        Commit(
            generation=number,
            time=status.reported_timestamp - 60 + 30 * number,
            seconds=0.25,
            experts=6,
            bytes=1 << 20,
            predicted_gain=0.05,
            achieved_gain=achieved,
            measured_gain=achieved,
            measured_gain_error=None if achieved is None else 0.005,
            imbalance_before=1.4,
        )
        for number, achieved in ((1, 0.04), (2, None))
    ]
    return status


def made_up_overview(status: Status) -> bytes:
    placement = Placement.contiguous(num_layers=2, num_experts=4, num_ranks=2)
    ranks, experts = np.array([[30.0, 10], [20, 20]]), np.array([[5.0, 1, 1, 1], [2, 2, 2, 2]])
    return encode(overview(status, ranks, experts, placement))


class Engine(EngineClient):
    """Answers with `payload`."""

    def __init__(self, payload: bytes, settings: dict[str, object]) -> None:
        super().__init__(**settings)
        self.payload = payload

    async def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[bytes]:
        self.asked.append(method)
        return [b"", self.payload]


@contextmanager
def page_server(engine: Engine, api_key: str | None = None) -> Iterator[str]:
    app, plugin = FastAPI(), create_endpoint_plugin()
    plugin.attach_router(app)

    async def begin() -> None:
        await plugin.init_state(engine, app.state, Namespace(api_key=api_key))

    app.router.on_startup.append(begin)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/ep_rebalance/"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_tab(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(autouse=True)
def nothing_noted(tab: Tab) -> None:
    tab.open("about:blank")
    tab.messages.clear()
    tab.requests.clear()


pytestmark = needs_chromium
SHOWN = "!document.getElementById('main').hidden"


def test_it_shows_what_the_engine_reports(tab: Tab) -> None:
    with page_server(Engine(made_up_overview(made_up_status()), {})) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        for tile, text in {
            "served": "1.125",
            "contiguous": "1.500",
            "saved": "25.0 %",
            "achieved": "4.0 %",
            "measured": "3.0 % to 5.0 % by step times",
            "waiting": "60.0 % of a step waits for experts (50.0 % to 70.0 %, learned)",
            "generation": "2",
            "experts": "15",
            "bytes": "3.0 MiB intranode",
            "state": "watching",
            "plans": "Plans: 2 committed.",
        }.items():
            assert tab.text(f"#{tile}") == text
        assert tab.text("#commits tr:first-child td:nth-child(8)") == "not yet"
        assert tab.text("#commits tr:last-child td:nth-child(8)") == "4.0 %"
        assert tab.text("#commits tr:first-child td:nth-child(9)") == "unknown"
        assert tab.text("#commits tr:last-child td:nth-child(9)") == "4.0 % ± 1.0 %"
        assert tab.text("#hottest tr:first-child") == "002.5010"
        assert "layer 0, rank 0, 1.50 times" in tab.text("#map-words")
        assert {request.removeprefix(url) for request in tab.requests} <= {"", "overview", "data:,"}
        assert tab.messages == []


def test_a_drafter_is_shown_apart(tab: Tab) -> None:
    status = made_up_status()
    with page_server(Engine(made_up_overview(status), {})) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        assert tab.evaluate("document.getElementById('drafter').hidden")
    drafter = make_status()
    drafter.info["mode"] = "observe"
    drafter.overall_imbalance = {"served": 1.75, "contiguous": 1.75}
    drafter.contiguous_imbalance, drafter.moe_layers = [1.5, 1.25], [61, 62]
    both = msgspec.structs.replace(
        msgspec.json.decode(made_up_overview(status), type=Overview),
        drafter=msgspec.json.decode(made_up_overview(drafter), type=Overview),
    )
    with page_server(Engine(encode(both), {})) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        words = tab.evaluate("document.getElementById('drafter-words').textContent")
        assert "Imbalance 1.750" in words
        assert "8 tokens" in words
        assert "stay where they were loaded" in words
        rows = tab.evaluate("document.getElementById('drafter-layers').innerText")
        assert rows.split() == ["61", "1.500", "1.500", "62", "1.250", "1.250"]
        assert "1.125" in tab.evaluate("document.getElementById('served').textContent")


def test_words_of_the_engine_are_text_and_nothing_else(tab: Tab) -> None:
    with page_server(Engine(made_up_overview(made_up_status()), {})) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        assert tab.text("#word") == f"said {HOSTILE}"
        assert HOSTILE in tab.text("#model")
        assert tab.evaluate("document.images.length") == 0
        tab.evaluate("document.body.append(Object.assign(document.createElement('script'),"
                     "{textContent: 'document.title = 1'}))")  # fmt: skip
        assert tab.evaluate("document.title") != "1"


@pytest.mark.parametrize(
    ("path", "word"),
    [("/var/lib/moe/traces", "/var/lib/moe/traces"), ("it's <b>", "'it'\"'\"'s <b>'")],
)
def test_a_server_with_a_trace_names_the_command_for_its_report(
    tab: Tab, path: str, word: str
) -> None:
    status = made_up_status()
    engine = Engine(made_up_overview(status), {})
    with page_server(engine) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        assert tab.evaluate("document.getElementById('trace').hidden")
        status.config["trace"]["path"] = path  # type: ignore[index]
        engine.payload = made_up_overview(status)
        tab.wait_for("!document.getElementById('trace').hidden")
        assert tab.text("#replay") == f"ep-rebalance replay {word} --report report.html"


def test_it_goes_on_with_newer_numbers(tab: Tab) -> None:
    status = made_up_status()
    engine = Engine(made_up_overview(status), {})
    with page_server(engine) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        status.activity, status.migrating, status.moves_planned, status.moves_done = (
            "migrating",
            1,
            8,
            2,
        )
        status.generation = 3
        status.steps += 16
        engine.payload = made_up_overview(status)
        tab.wait_for("document.getElementById('state').textContent === 'moving experts'")
        assert tab.text("#doing") == "2 of 8 experts arrived"
        tab.wait_for("document.getElementById('state').textContent === 'idle'")
        assert tab.evaluate("document.getElementById('progress').value") == 0.25
        assert tab.evaluate("document.querySelectorAll('#course .commit').length") == 1


def test_it_says_when_the_engine_does_not_answer_and_goes_on(tab: Tab) -> None:
    engine = Engine(b"", {})
    with page_server(engine) as url:
        tab.open(url)
        tab.wait_for("!document.getElementById('trouble').hidden")
        assert "the engine has not answered" in tab.text("#trouble")
        engine.payload = made_up_overview(made_up_status())
        tab.wait_for(SHOWN)
        assert tab.evaluate("document.getElementById('trouble').hidden")


def test_it_asks_for_the_key_of_a_server_that_has_one(tab: Tab) -> None:
    with page_server(Engine(made_up_overview(made_up_status()), {}), api_key="s3cret") as url:
        tab.open(url)
        for secret in ("wrong", "s3cret"):
            tab.wait_for("!document.getElementById('key').hidden")
            assert not tab.evaluate(SHOWN)
            tab.evaluate(f"document.getElementById('secret').value = '{secret}'")
            tab.evaluate("document.querySelector('#key button').click()")
            if secret == "wrong":
                tab.wait_for("document.getElementById('wrong').textContent !== ''")
        tab.wait_for(SHOWN)
        assert not any("s3cret" in request for request in tab.requests)


def test_the_map_is_read_with_the_keyboard(tab: Tab) -> None:
    with page_server(Engine(made_up_overview(made_up_status()), {})) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        tab.evaluate("document.getElementById('map').focus()")
        tab.press("ArrowRight")
        assert "Layer 0, rank 0: 1.50 times" in tab.text("#cell")
        tab.press("ArrowRight")
        assert "Layer 0, rank 1: 0.50 times" in tab.text("#cell")
        tab.press("ArrowDown")
        tab.press("ArrowDown")
        assert "Layer 1, rank 1: 1.00 times" in tab.text("#cell")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_any_window(tab: Tab, width: int, dark: bool, tmp_path: Path) -> None:
    tab.look(width=width, dark=dark)
    with page_server(Engine(made_up_overview(made_up_status()), {})) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


def test_nobody_asks_while_the_page_is_hidden(tab: Tab) -> None:
    engine = Engine(made_up_overview(made_up_status()), {})
    with page_server(engine) as url:
        tab.open(url)
        tab.wait_for(SHOWN)
        tab.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
        time.sleep(2.5)
        asked = len(engine.asked)
        time.sleep(4.5)
        assert engine.asked.count("ep_rebalance_overview") <= 3
        assert len(engine.asked) - asked <= 1  # the exporter's


def test_a_server_may_have_no_page(tab: Tab) -> None:
    with page_server(Engine(b"", {"metrics": {"page": False}})) as url:
        tab.open(url)
        assert "metrics.page" in tab.text("body")
