"""A running server: its status, and what it found when it tried to move experts at start."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.foreign_json import decoded
from ep_rebalance.printable import printable
from ep_rebalance.telemetry.metrics import Status, decode

_MAX_BYTES = 64 << 20


class NoStatus(Exception):
    """A server did not answer with a status. The text says why."""


WHY_NO_STATUS = (
    "Is the server up, was it started with --plugin ep_rebalance, and is --api-key right?"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to `GET /ep_rebalance/status`.

    status: with defaults for what another version of the plugin does not say.
    as_sent: all of it, also what this version does not know.
    """

    status: Status
    as_sent: dict[str, Any]


def is_address(text: str) -> bool:
    """Whether it names a server, and not a file."""
    return text.startswith(("http://", "https://"))


def no_address(text: str) -> str:
    """What is wrong with a text that is none, and the remedy."""
    return f"{text} is no address; write it as http://HOST:PORT"


def fetch_status(server: str, api_key: str) -> Answer:
    """What a server answers. Raises NoStatus."""
    if not is_address(server):
        raise NoStatus(f"{no_address(server)}.")
    url = f"{server.rstrip('/')}/ep_rebalance/status"
    try:
        request = urllib.request.Request(url)
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=10) as response:
            payload = response.read(_MAX_BYTES)
        return read_answer(payload)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):  # it is a response, too, with a connection
            error.close()
        why = error.reason if type(error) is urllib.error.URLError else error
        # What a server gives as its reason may hold anything.
        raise NoStatus(printable(f"{url} did not answer with a status: {why}")) from None


def read_answer(payload: bytes) -> Answer:
    """Raises ValueError for what is no status."""
    sent = decoded(payload, dict)
    return Answer(status=decode(msgspec.json.encode(_countable(sent))), as_sent=sent)


def _countable(value: Any) -> Any:
    """The same with null for whole numbers that count nothing: of more than 64 bits."""
    if isinstance(value, dict):
        return {key: _countable(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_countable(one) for one in value]
    return None if isinstance(value, int) and abs(value) >> 63 else value


def checks(url: str, api_key: str) -> list[tuple[str, Check]]:
    """(name, check) pairs for a server; none without its address."""
    return [("server", lambda: server(url, api_key))] if url else []


def server(url: str, api_key: str) -> Iterator[Finding]:
    """Whether the plugin is at work there, and whether experts were seen to move."""
    try:
        status = fetch_status(url, api_key).status
    except NoStatus as error:
        yield Finding(
            check="server",
            verdict="problem",
            found=str(error),
            remedy=WHY_NO_STATUS,
        )
        return
    mode = status.info.get("mode", "not told")
    yield Finding(
        check="server",
        verdict="ok",
        found=f"mode {mode}, {status.layers} MoE layers, generation {status.generation}",
    )
    yield _self_test(mode, status)


def _self_test(mode: str, status: Status) -> Finding:
    if mode == "observe":
        return Finding(check="self-test", verdict="skipped", found="nothing moves in mode observe")
    if not status.self_test:
        return Finding(
            check="self-test",
            verdict="warning",
            found="moves were not tried at start",
            remedy="serve with quantisation.self_test=true, which proves them on that machine",
        )
    return Finding(check="self-test", verdict="ok", found=told_self_test(status))


def told_self_test(status: Status) -> str:
    """What the trial at start found, in a line."""
    if not status.self_test:
        return "not tried"
    counts = ", ".join(f"{count} {verdict}" for verdict, count in status.self_test.items())
    return f"MoE layers: {counts}; it took {status.self_test_seconds:.1f} s"
