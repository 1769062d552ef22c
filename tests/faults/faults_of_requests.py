"""Clients that behave badly: to our routes, and to the engine while experts move."""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
from fault import fault
from scene import QUESTIONS, Scene
from serving import OPERATOR

ROUTES = ("", "status", "load", "overview", "pause", "resume", "rebalance", "record", "audit")
MALFORMED = 10_000
STORM_SECONDS = 15.0
UNHARMED = "each is answered with 4xx or 5xx in time, or its connection ends; serving goes on"


@fault(f"{MALFORMED:,} malformed requests to our routes", UNHARMED, bound_seconds=150.0)
def malformed(scene: Scene, seed: int) -> str:
    chance = random.Random(seed)
    with scene.fault("malformed requests"), ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(lambda n: _malformed(scene, n, chance), range(MALFORMED)))
    scene.serves_on()
    assert not answers["200"], answers
    return ", ".join(f"{count:,} x {answer}" for answer, count in answers.most_common())


def _malformed(scene: Scene, number: int, chance: random.Random) -> str:
    """One of a kind that no route takes: what it was answered with, or "closed"."""
    route = ROUTES[number % len(ROUTES)]
    garbage = chance.randbytes(chance.randrange(1, 200))
    kinds = (
        b"POST /ep_rebalance/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n",
        b"POST /ep_rebalance/%s?on=maybe HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        + b"x" * 99
        + b"\r\n\r\n",
        b"DELETE /ep_rebalance/%s HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /ep_rebalance/%s/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        garbage.replace(b"%", b"") + b"/ep_rebalance/%s\r\n\r\n",
        b"POST /ep_rebalance/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Basic "
        + garbage.hex().encode()
        + b"\r\n\r\n",
    )
    place = urlsplit(scene.server.url)
    try:
        with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
            connection.sendall(chance.choice(kinds).replace(b"%s", route.encode()))
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64).split(b" ")
    except OSError:
        return "closed"
    return answer[1].decode() if len(answer) > 1 else "closed"


@fault("control changes in a storm", "limited; the last one holds")
def control_storm(scene: Scene, seed: int) -> str:
    before = _tokens_per_second(scene)
    end, said = time.monotonic() + STORM_SECONDS, Counter[int]()
    with (
        scene.fault("control storm"),
        httpx.Client(base_url=scene.server.url, timeout=30) as client,
    ):
        client.headers["authorization"] = f"Bearer {OPERATOR}"
        for action in itertools.cycle(("pause", "resume", "record?on=false", "record?on=true")):
            said[client.post(f"/ep_rebalance/{action}").status_code] += 1
            if time.monotonic() > end:
                break
        meanwhile = _tokens_per_second(scene, asked=client)
        for action in ("resume", "record?on=true"):
            _until_taken(client, action)
    scene.until("during")
    scene.serves_on()
    counts = ", ".join(f"{n:,} x {status}" for status, n in said.items())
    return f"{counts}; {before:.0f} tokens/s before, {meanwhile:.0f} meanwhile"


def _until_taken(client: httpx.Client, action: str) -> None:
    """Until a change passes; 409 says that it is so already."""
    for _ in range(60):
        answer = client.post(f"/ep_rebalance/{action}")
        if answer.status_code in (httpx.codes.OK, httpx.codes.CONFLICT):
            return
        time.sleep(float(answer.headers.get("retry-after", 0.5)))
    raise AssertionError(f"{action}: {answer.status_code} {answer.text}")


def _tokens_per_second(
    scene: Scene, asked: httpx.Client | None = None, seconds: float = 5.0
) -> float:
    """Generated tokens; `asked` sends changes meanwhile."""
    began, first = time.monotonic(), scene.server.status()["phase_tokens"]["decode"]
    while time.monotonic() < began + seconds:
        if asked is None:
            time.sleep(0.1)
        else:
            asked.post("/ep_rebalance/pause")
            asked.post("/ep_rebalance/resume")
    last = scene.server.status()["phase_tokens"]["decode"]
    return float(last - first) / (time.monotonic() - began)


@fault("200 requests given up by their clients amid migrations", "all others are right")
def aborted(scene: Scene, seed: int) -> str:
    chance = random.Random(seed)
    scene.until("during")

    def give_up(number: int) -> bool:
        body = {
            "model": "tiny_moe",
            "prompt": QUESTIONS[number % len(QUESTIONS)],
            "max_tokens": 400,
        }
        patience = chance.uniform(0.01, 1.0)
        try:
            httpx.post(
                f"{scene.server.url}/v1/completions",
                json=body | {"ignore_eos": True},
                timeout=httpx.Timeout(30, read=patience),
            )
        except httpx.ReadTimeout:
            return True
        except httpx.HTTPError:
            return False
        return False

    with scene.fault("clients give up"), ThreadPoolExecutor(16) as pool:
        gone = sum(pool.map(give_up, range(200)))
    scene.serves_on()
    return f"{gone} of 200 gave up"


@fault("200 reads of each route at once", "limited or answered; serving goes on")
def read_storm(scene: Scene, seed: int) -> str:
    def read(number: int) -> int:
        route = ("status", "load", "overview")[number % 3]
        return httpx.get(
            f"{scene.server.url}/ep_rebalance/{route}",
            headers={"authorization": f"Bearer {OPERATOR}"},
            timeout=60,
        ).status_code

    with scene.fault("reads"), ThreadPoolExecutor(32) as pool:
        answers = Counter(pool.map(read, range(600)))
    scene.serves_on()
    assert set(answers) <= {200, 429, 503}, answers
    return ", ".join(f"{count} x {status}" for status, count in answers.items())
