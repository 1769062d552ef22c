"""A running server: its status, and what it found when it tried to move experts at start."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import msgspec

from ep_rebalance.diagnosis.finding import Check, Finding
from ep_rebalance.telemetry.metrics import decode


class NoStatus(Exception):
    """A server did not answer with a status. The text says why."""


WHY_NO_STATUS = (
    "Is the server up, was it started with --plugin ep_rebalance, and is --api-key right?"
)


def fetch_status(server: str, api_key: str) -> dict[str, Any]:
    """The answer of a server to `GET /ep_rebalance/status`. Raises NoStatus."""
    if not server.startswith(("http://", "https://")):
        raise NoStatus(f"{server} is no address; write it as http://HOST:PORT.")
    url = f"{server.rstrip('/')}/ep_rebalance/status"
    try:
        request = urllib.request.Request(url)
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=10) as response:
            payload = response.read()
        # Only to check it: what is shown may include fields that this version does not know.
        decode(payload)
        answer: dict[str, Any] = json.loads(payload)
        return answer
    except (OSError, http.client.HTTPException, ValueError, msgspec.MsgspecError) as error:
        if isinstance(error, urllib.error.HTTPError):  # it is a response, too, with a connection
            error.close()
        why = error.reason if type(error) is urllib.error.URLError else error
        raise NoStatus(f"{url} did not answer with a status: {why}") from None


def checks(url: str, api_key: str) -> list[tuple[str, Check]]:
    """(name, check) pairs for a server; none without its address."""
    return [("server", lambda: server(url, api_key))] if url else []


def server(url: str, api_key: str) -> Iterator[Finding]:
    """Whether the plugin is at work there, and whether experts were seen to move."""
    try:
        answer = fetch_status(url, api_key)
    except NoStatus as error:
        yield Finding(
            check="server",
            verdict="problem",
            found=str(error),
            remedy=WHY_NO_STATUS,
        )
        return
    mode = answer["info"]["mode"]
    yield Finding(
        check="server",
        verdict="ok",
        found=f"mode {mode}, {answer['layers']} MoE layers, generation {answer['generation']}",
    )
    yield _self_test(mode, answer)


def _self_test(mode: str, answer: dict[str, Any]) -> Finding:
    if mode == "observe":
        return Finding(check="self-test", verdict="skipped", found="nothing moves in mode observe")
    if not answer.get("self_test"):
        return Finding(
            check="self-test",
            verdict="warning",
            found="moves were not tried at start",
            remedy="serve with quantisation.self_test=true, which proves them on that machine",
        )
    return Finding(check="self-test", verdict="ok", found=told_self_test(answer))


def told_self_test(answer: dict[str, Any]) -> str:
    """What the trial at start found, in a line. answer: a status."""
    verdicts = answer.get("self_test") or {}
    if not verdicts:
        return "not tried"
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return f"MoE layers: {counts}; it took {answer['self_test_seconds']:.1f} s"
